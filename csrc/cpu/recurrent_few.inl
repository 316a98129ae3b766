// Steps of few sequences: what ForwardKernel does with at most Product::kFewRows of them. Included inside the namespace of an instruction
// set, after it.
//
// The weights of a step come from the second-level cache half as fast as a row could be multiplied with them. So the next chunk's input is
// projected meanwhile, in pieces that the first cache holds; and the units of many tiles are finished together, two vectors at a time.

#define FASTSEQ_FEW(...)                                                                   \
  template <class Product, class S, template <class> class Cell, bool kZoned, bool kFew> \
  __VA_ARGS__ ForwardKernel<Product, S, Cell, kZoned, kFew>

// Whether pieces of the next chunk run between the products of one sequence.
FASTSEQ_FEW(bool)::projects_ahead(const Forward& a, const Work& w) {
  return NV >= 3 && w.rows.slots == 1 && (UB == 1 || a.shape.hidden % (UB * W) == 0) && Product::runs(a.shape.output) > 0 &&
         (w.unit_tiles[1] - w.unit_tiles[0]) * Product::tile_bytes(NV, a.shape.output) <= Product::kPiecesBytes;
}

// Sees to it that the steps [begin, end) are projected, and has the chunk after them made during them.
FASTSEQ_FEW(void)::begin_ahead(int64_t begin, int64_t end, int64_t turn) {
  few.half = turn & 1;
  if (begin == 0) plan_ahead(0, end, 0);
  while (few.left) next_piece(x, x);
  if (end < w.rows.steps) plan_ahead(end, end_of_chunk(end), 1 - few.half);
  few.runs = (end - begin) * (w.unit_tiles[1] - w.unit_tiles[0]) * Product::runs(P);
}

FASTSEQ_FEW(void)::plan_ahead(int64_t begin, int64_t end, int64_t to) {
  few.to = to, few.rows = gather_input(begin, end, to);
  few.tile = w.unit_tiles[0], few.piece = few.row = few.credit = 0;
  few.left = few.of_chunk =
      (w.unit_tiles[1] - w.unit_tiles[0]) * Product::template pieces<NV>(I) * blocks_of(few.rows, Product::kPieceRows);
}

// Before a run of recurrent weights, whose panels begin there: its share of the pieces.
FASTSEQ_FEW(void)::project_ahead(const void* first, const void* second) {
  for (few.credit += few.of_chunk; few.credit >= few.runs && few.left; few.credit -= few.runs) next_piece(first, second);
}

FASTSEQ_FEW(void)::next_piece(const void* first, const void* second) {
  const int64_t own = few.tile - w.unit_tiles[0], row = few.row;
  Product::template multiply_piece<NV>(few.piece, chunk.x[few.to], row, min(Product::kPieceRows, few.rows - row),
                                       unit_tile(a.input_weights, few.tile, I), I, chunk.bias + own * NV * W,
                                       chunk.gates[few.to] + own * chunk.tile_size + row * NV * W, first, second);
  --few.left;
  if ((few.row += Product::kPieceRows) < few.rows) return;
  few.row = 0;
  if (++few.piece == Product::template pieces<NV>(I)) few.piece = 0, ++few.tile;
}

// The units of some tiles, of `active` sequences: two vectors of them at a time, the latencies of one during the operations of the other.
FASTSEQ_FEW(__attribute__((noinline)) void)::finish_items(const Item<A>* items, int64_t count, int64_t active) {
  struct Place {
    const A *sums, *x_sums;
    int64_t slot, unit;
  };
  struct Places {
    Place of[2];
    const int64_t* index;
    const A* sums(int64_t i) const { return of[i].sums; }
    const A* x_sums(int64_t i) const { return of[i].x_sums; }
    int64_t place(int64_t i) const { return index[of[i].slot]; }
    int64_t slot(int64_t i) const { return of[i].slot; }
    int64_t unit(int64_t i) const { return of[i].unit; }
  } places{{}, w.rows.index};
  // the vectors of units within [begin, end)
  const auto each = [&](int64_t begin, int64_t end, const auto& visit) __attribute__((always_inline)) {
    for (const Item<A>* item = items; item < items + count; ++item)
      for (int64_t b = 0; b < item->vectors / G; ++b) {
        const int64_t u = (item->tile * UB + b) * W;
        for (int64_t r = 0; r < active && begin <= u && u < end; ++r) {
          const A* sums = item->sums + (r * item->vectors + b) * W;
          visit(Place{sums, !kOwn ? nullptr : x ? projected_input(*item, r) : sums + kOwn * W, r, u});
        }
      }
  };
  const int64_t whole = H / W * W;
  finish_vectors<true>(0, 0, [&](const auto& finish) __attribute__((always_inline)) {
    int64_t waiting = 0;
    each(0, whole, [&](const Place& place) __attribute__((always_inline)) {
      places.of[waiting++] = place;
      if (waiting == 2) finish.template operator()<TwoRows<A, Activations>>(places, 0), waiting = 0;
    });
    if (waiting) finish.template operator()<OneRow<A, Activations>>(places, 0);
  });
  if (whole < H)
    finish_vectors<false>(0, whole, [&](const auto& finish) __attribute__((always_inline)) {
      each(whole, H, [&](const Place& place) __attribute__((always_inline)) {
        places.of[0] = {place.sums, place.x_sums, place.slot, 0};
        finish.template operator()<OneRow<A, Activations>>(places, 0);
      });
    });
}

#undef FASTSEQ_FEW
