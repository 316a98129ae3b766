// AMX tiles of bfloat16. Included inside the namespace of an instruction set, after vector.inl.
//
// A tile register holds up to 16 rows of 64 bytes. A, the left-hand matrix, is loaded as it lies: 16 rows x 32 values. B holds 16
// pairs of depths x 16 columns, the two values of a pair side by side; C 16 rows x 16 columns of fp32.

#ifdef FASTSEQ_EMULATED_TILES  // tests/csrc/emulator/tiles.h, on a processor without AMX
using emulated::tile_load, emulated::tile_multiply, emulated::tile_store, emulated::tile_stream, emulated::tile_zero;
using emulated::tiles_configure, emulated::tiles_release;
#else
// Tile instructions as assembly, since gcc 12's intrinsics know nothing of the memory that they read and write.
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
// without a place in the first-level cache, for what does not fit there
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_stream(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
FASTSEQ_HOST_DEVICE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
FASTSEQ_HOST_DEVICE void tiles_configure(const void* configuration) {
  asm volatile("ldtilecfg %0" ::"m"(*static_cast<const char(*)[64]>(configuration)) : "memory");
}
FASTSEQ_HOST_DEVICE void tiles_release() { asm volatile("tilerelease" ::: "memory"); }
#endif

// The rows of the eight tiles, and their bytes, 64 unless given. It is the thread's own, and other libraries' kernels change it: it holds
// from construction to destruction, within which nothing else runs.
class TileConfiguration {
 public:
  explicit TileConfiguration(std::initializer_list<int64_t> rows, std::initializer_list<int64_t> bytes = {}) {
    struct alignas(64) {
      uint8_t palette, start;
      uint8_t reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } configuration{};
    configuration.palette = 1;
    int tile = 0;
    for (int64_t of_tile : rows) configuration.bytes[tile] = 64, configuration.rows[tile++] = of_tile;
    tile = 0;
    for (int64_t of_row : bytes) configuration.bytes[tile++] = of_row;
    tiles_configure(&configuration);
  }
  ~TileConfiguration() { tiles_release(); }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;
};

// A vector as one bfloat16, or as three that add up to it, the largest first. A product of two floats is six of the nine products of their
// parts: what the others would add is below a rounding, and six of these are faster than one multiply-add. Not so beyond a range: infinity
// is no sum of parts, and parts below 2^-126 are taken as zero.
template <int kParts>
FASTSEQ_HOST_DEVICE void in_parts(Lanes<float>::V v, Halves<bfloat16>::H* parts) {
  using Half = Halves<bfloat16>;
  parts[0] = Half::narrowed(v);
  if constexpr (kParts == 3) {
    v -= Half::widened(parts[0]);
    parts[1] = Half::narrowed(v);
    v -= Half::widened(parts[1]);
    parts[2] = __builtin_convertvector((Lanes<float>::U)v >> 16, Half::H);  // at most eight bits are left
  }
}
