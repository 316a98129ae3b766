// Each word of common/prims.cuh in a tiny kernel with a known answer, on the host and on a GPU: what ties the two machines
// together.

#include <cmath>
#include <initializer_list>
#include <limits>

#include "harness.h"

using namespace fastseq::gpu;
using harness::Array;
using harness::must_run;

namespace {

constexpr Launch plain(int grid, int block, int smem = 0) { return {grid, block, 1, smem, false, nullptr}; }
constexpr Launch cooperative(int grid, int block, int smem = 0) { return {grid, block, 1, smem, true, nullptr}; }
constexpr Launch clusters(int grid, int block, int cluster, int smem) { return {grid, block, cluster, smem, false, nullptr}; }

// where a thread is

struct Ids {
  int tid, lane, warp, nthreads, bid, rank;
};
struct IdsParams {
  Ids* ids;
};

FASTSEQ_KERNEL(96) write_ids(FASTSEQ_PARAMETERS IdsParams p) {
  p.ids[bid() * nthreads() + tid()] = {tid(), lane(), warp(), nthreads(), bid(), cta_rank()};
}

void check_ids(const Launch& how) {
  Array<Ids> ids(how.grid * how.block);
  must_run(write_ids, how, {ids.data()});
  for (int i = 0; i < ids.count(); ++i) {
    const int thread = i % how.block, cta = i / how.block;
    const Ids& id = ids[i];
    CHECK(id.tid == thread && id.lane == thread % 32 && id.warp == thread / 32, "%d", i);
    CHECK(id.nthreads == how.block && id.bid == cta && id.rank == cta % how.cluster, "%d", i);
  }
}

void ids() { check_ids(plain(3, 96)); }
void ids_in_clusters() { check_ids(clusters(8, 96, 4, 0)); }
void many_ctas() { check_ids(plain(70, 96)); }
void ragged_block() { check_ids(plain(2, 41)); }

// shared memory

struct Words {
  const uint32_t* in;
  uint32_t* out;
};

FASTSEQ_KERNEL(64) measure_pieces(FASTSEQ_PARAMETERS Words p) {
  Smem smem;
  auto* bytes = smem.take<unsigned char>(3);
  auto* vectors = smem.take<Vec16>(2);
  auto* words = smem.take<uint32_t>(64);
  if (tid() < 3) bytes[tid()] = 1;
  if (tid() < 2) vectors[tid()] = {{2, 2, 2, 2}};
  words[tid()] = tid();
  cta_sync();
  p.out[tid()] = words[63 - tid()] + 100 * bytes[tid() % 3] + 1000 * vectors[tid() % 2].word[3];
  if (tid() == 0) p.out[64] = reinterpret_cast<uintptr_t>(bytes) % 128 + reinterpret_cast<uintptr_t>(vectors) % 128;
}

void pieces() {
  Array<uint32_t> out(65);
  must_run(measure_pieces, plain(1, 64, piece_bytes<unsigned char>(3) + piece_bytes<Vec16>(2) + piece_bytes<uint32_t>(64)),
           {nullptr, out.data()});
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 2100u + 63 - i, "%d is %u", i, out[i]);
  CHECK(out[64] == 0, "pieces begin at multiples of 128 bytes");
}

constexpr int kLargeShared = 99 * 1024;

FASTSEQ_KERNEL(32) fill_shared(FASTSEQ_PARAMETERS Words p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(kLargeShared / 4);
  for (int i = tid(); i < kLargeShared / 4; i += nthreads()) words[i] = i;
  cta_sync();
  uint32_t sum = 0;
  for (int i = 31 - tid(); i < kLargeShared / 4; i += nthreads()) sum += words[i];
  p.out[tid()] = sum;
}

void large_shared() {
  Array<uint32_t> out(32);
  must_run(fill_shared, plain(1, 32, kLargeShared), {nullptr, out.data()});
  for (uint32_t i = 0; i < 32; ++i) {
    uint32_t sum = 0;
    for (uint32_t j = 31 - i; j < kLargeShared / 4; j += 32) sum += j;
    CHECK(out[i] == sum, "%u", i);
  }
}

// synchronization inside a CTA

FASTSEQ_KERNEL(256) turn_around(FASTSEQ_PARAMETERS Words p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(256);
  uint32_t sum = 0;
  for (uint32_t turn = 0; turn < 5; ++turn) {
    words[tid()] = tid() + 1000 * turn;
    cta_sync();
    sum += words[nthreads() - 1 - tid()];
    cta_sync();
  }
  p.out[tid()] = sum;
}

void cta_syncs() {
  for (const int block : {256, 100}) {
    Array<uint32_t> out(block);
    must_run(turn_around, plain(1, block, 1024), {nullptr, out.data()});
    for (int i = 0; i < block; ++i) CHECK(out[i] == 5u * (block - 1 - i) + 10000, "%d is %u", i, out[i]);
  }
}

FASTSEQ_KERNEL(64) rotate_in_warp(FASTSEQ_PARAMETERS Words p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(64) + 32 * warp();
  uint32_t sum = 0;
  for (uint32_t turn = 0; turn < 5; ++turn) {
    words[lane()] = 100 * warp() + lane() + turn;
    warp_sync();
    sum += words[(lane() + 1) % 32];
    warp_sync();
  }
  p.out[tid()] = sum;
}

void warp_syncs() {
  Array<uint32_t> out(64);
  must_run(rotate_in_warp, plain(1, 64, 256), {nullptr, out.data()});
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 5u * (100 * (i / 32) + (i + 1) % 32) + 10, "%d is %u", i, out[i]);
}

struct Floats {
  const float* in;
  float* out;
};

FASTSEQ_KERNEL(64) butterfly(FASTSEQ_PARAMETERS Floats p) {
  for (int mask = 1; mask < 32; ++mask) p.out[(mask - 1) * 64 + tid()] = shuffle_xor(static_cast<float>(tid()), mask);
}

void shuffles() {
  Array<float> out(31 * 64);
  must_run(butterfly, plain(1, 64), {nullptr, out.data()});
  for (int mask = 1; mask < 32; ++mask) {
    for (int i = 0; i < 64; ++i) CHECK(out[(mask - 1) * 64 + i] == static_cast<float>(i ^ mask), "%d with %d", i, mask);
  }
}

// copies

FASTSEQ_KERNEL(32) copy_in_groups(FASTSEQ_PARAMETERS Words p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(3 * 128);
  for (int group = 0; group < 3; ++group) {
    cp_async16(words + 128 * group + 4 * tid(), p.in + 128 * group + 4 * tid());
    cp_commit();
  }
  cp_wait<2>();
  warp_sync();
  for (int i = lane(); i < 128; i += 32) p.out[i] = words[127 - i];
  cp_wait<0>();
  warp_sync();
  for (int i = lane(); i < 256; i += 32) p.out[128 + i] = words[128 + 255 - i];
}

void copies() {
  Array<uint32_t> in(3 * 128), out(3 * 128);
  for (int i = 0; i < in.count(); ++i) in[i] = 7 * i;
  must_run(copy_in_groups, plain(1, 32, 3 * 512), {in.data(), out.data()});
  for (int i = 0; i < 128; ++i) CHECK(out[i] == 7u * (127 - i), "%d is %u", i, out[i]);
  for (int i = 0; i < 256; ++i) CHECK(out[128 + i] == 7u * (128 + 255 - i), "%d is %u", i, out[128 + i]);
}

// Copies whose source another CTA has just written come through L2.
struct Relay {
  uint32_t* data;
  uint32_t* flags;
  uint32_t* out;
  int steps;
};

FASTSEQ_KERNEL(32) copy_published(FASTSEQ_PARAMETERS Relay p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(128);
  for (uint32_t step = 1; step <= 4; ++step) {
    if (bid() == 0) {
      flags_wait(p.flags + 1, 1, step - 1);
      for (int i = lane(); i < 128; i += 32) p.data[i] = 1000 * step + i;
      flag_publish(p.flags, step);
    } else {
      flags_wait(p.flags, 1, step);
      cp_async16(words + 4 * lane(), p.data + 4 * lane());
      cp_commit();
      cp_wait<0>();
      warp_sync();
      for (int i = lane(); i < 128; i += 32) p.out[128 * (step - 1) + i] = words[127 - i];
      flag_publish(p.flags + 1, step);
    }
  }
}

void copies_of_published() {
  Array<uint32_t> data(128), flags(2), out(4 * 128);
  must_run(copy_published, cooperative(2, 32, 512), {data.data(), flags.data(), out.data(), 4});
  for (int i = 0; i < out.count(); ++i) CHECK(out[i] == 1000u * (i / 128 + 1) + 127 - i % 128, "%d is %u", i, out[i]);
}

// flags

FASTSEQ_KERNEL(64) chain(FASTSEQ_PARAMETERS Relay p) {
  const int own = bid();
  if (warp() == 0 && own > 0) flags_wait(p.flags + own - 1, 1, 5);
  cta_sync();
  p.data[64 * own + tid()] = (own > 0 ? p.data[64 * (own - 1) + 63 - tid()] : tid()) + 1;
  cta_sync();
  if (warp() == 1) flag_publish(p.flags + own, 5);
}

void flags_in_a_chain() {
  constexpr int kCtas = 6;
  Array<uint32_t> data(64 * kCtas), flags(kCtas);
  must_run(chain, cooperative(kCtas, 64), {data.data(), flags.data(), nullptr, 0});
  for (uint32_t cta = 0; cta < kCtas; ++cta) {
    for (uint32_t i = 0; i < 64; ++i) CHECK(data[64 * cta + i] == (cta % 2 ? 63 - i : i) + cta + 1, "%u of %u", i, cta);
  }
}

// Every CTA waits for every other in every step; what is published alternates between two buffers.
FASTSEQ_KERNEL(96) all_to_all(FASTSEQ_PARAMETERS Relay p) {
  // grid() is not a word of kernels
  const int ctas = p.steps >> 16, steps = p.steps & 0xffff;
  uint32_t value = bid() + 1;
  const uint32_t begin = p.out[0];
  for (int step = 0; step < steps; ++step) {
    uint32_t* buffer = p.data + (step & 1) * ctas;
    if (tid() == 0) buffer[bid()] = value;
    cta_sync();
    if (warp() == 0) {
      flag_publish(p.flags + bid(), begin + step + 1);
      flags_wait(p.flags, ctas, begin + step + 1);
    }
    cta_sync();
    value = 0;
    for (int i = 0; i < ctas; ++i) value += buffer[i] * (i + 1);
    value = value % 1009 + bid();
  }
  if (tid() == 0) p.out[1 + bid()] = value;
}

void exchange(int ctas, int block, uint32_t begin) {
  constexpr int kSteps = 5;
  Array<uint32_t> data(2 * ctas), flags(ctas, begin), out(1 + ctas, begin), expected(ctas), sent(ctas);
  must_run(all_to_all, cooperative(ctas, block), {data.data(), flags.data(), out.data(), ctas << 16 | kSteps});
  for (int i = 0; i < ctas; ++i) expected[i] = i + 1;
  for (int step = 0; step < kSteps; ++step) {
    uint32_t sum = 0;
    for (int i = 0; i < ctas; ++i) sum += expected[i] * (i + 1);
    for (int i = 0; i < ctas; ++i) expected[i] = sum % 1009 + i;
  }
  for (int i = 0; i < ctas; ++i) CHECK(out[1 + i] == expected[i], "%d is %u, not %u", i, out[1 + i], expected[i]);
}

void flags_of_all() { exchange(5, 64, 0); }
void more_flags_than_lanes() { exchange(40, 32, 0); }
void flags_wrap_around() { exchange(3, 96, 0xfffffffd); }

// clusters

FASTSEQ_KERNEL(32) meet(FASTSEQ_PARAMETERS Relay p) {
  uint32_t sum = 0;
  const int first = bid() - cta_rank();
  for (int turn = 0; turn < 3; ++turn) {
    if (tid() == 0) p.data[bid()] = 10 * bid() + turn;
    cluster_sync();
    for (int i = 0; i < 4; ++i) sum += p.data[first + i];
    cluster_sync();
  }
  p.out[bid() * 32 + tid()] = sum;
}

void cluster_syncs() {
  Array<uint32_t> data(8), out(8 * 32);
  must_run(meet, clusters(8, 32, 4, 0), {data.data(), nullptr, out.data(), 0});
  for (int i = 0; i < out.count(); ++i) CHECK(out[i] == (i < 128 ? 3u * 60 : 3u * 220) + 12, "%d is %u", i, out[i]);
}

// A token goes round; every CTA adds to it.
FASTSEQ_KERNEL(64) ring(FASTSEQ_PARAMETERS Relay p) {
  constexpr int kSize = 4;
  Smem smem;
  auto* token = smem.take<Vec16>(2 * 32);  // the second half stays
  auto* barrier = smem.take<Mbarrier>(1);
  mbarrier_init(barrier, 1, 32 * sizeof(Vec16));
  cluster_sync();
  const int next = (cta_rank() + 1) % kSize;
  for (int round = 0; round < p.steps; ++round) {
    const bool begins = cta_rank() == 0 && round == 0;
    if (!begins) {
      mbarrier_wait(barrier, (round - (cta_rank() == 0)) & 1);
      if (tid() == 0 && round - (cta_rank() == 0) + 1 < p.steps) mbarrier_expect(barrier, 32 * sizeof(Vec16));
      cta_sync();
    }
    if (warp() == 0) {
      const uint32_t own = cta_rank() + 1;
      Vec16 value = {{own, own, own, own}};
      if (!begins) {
        for (uint32_t i = 0; i < 4; ++i) value.word[i] = token[lane()].word[i] * 3 + own + i;
      }
      warp_sync();
      st_async(peer(token, next) + lane(), value, peer(barrier, next));
    }
  }
  if (cta_rank() == 0) mbarrier_wait(barrier, (p.steps - 1) & 1);
  if (cta_rank() == 0 && warp() == 1) {
    for (uint32_t i = 0; i < 4; ++i) p.out[4 * lane() + i] = token[lane()].word[i];
  }
  cluster_sync();
}

void sends_in_a_ring() {
  constexpr int kRounds = 5;
  Array<uint32_t> out(128);
  must_run(ring, clusters(4, 64, 4, piece_bytes<Vec16>(64) + piece_bytes<Mbarrier>(1)), {nullptr, nullptr, out.data(), kRounds});
  for (uint32_t i = 0; i < 4; ++i) {
    uint32_t value = 1;
    for (uint32_t n = 1; n < 4 * kRounds; ++n) value = value * 3 + n % 4 + 1 + i;
    for (int lane = 0; lane < 32; ++lane) CHECK(out[4 * lane + i] == value, "%d is %u, not %u", lane, out[4 * lane + i], value);
  }
}

// Every CTA sends to every CTA, itself too, in every step; buffers and barriers alternate.
FASTSEQ_KERNEL(64) all_gather(FASTSEQ_PARAMETERS Relay p) {
  const int size = p.steps >> 16, steps = p.steps & 0xffff;
  Smem smem;
  auto* buffers = smem.take<Vec16>(2 * 16);
  auto* barriers = smem.take<Mbarrier>(2);
  mbarrier_init(barriers, 2, size * sizeof(Vec16));
  cluster_sync();
  uint32_t value = cta_rank() + 1;
  for (int step = 0; step < steps; ++step) {
    const int b = step & 1;
    if (tid() < size) st_async(peer(buffers + 16 * b, tid()) + cta_rank(), {{value, 0, 0, value + 1}}, peer(barriers + b, tid()));
    mbarrier_wait(barriers + b, step >> 1 & 1);
    value = 0;
    for (int i = 0; i < size; ++i) value += buffers[16 * b + i].word[0] * (i + 1) + buffers[16 * b + i].word[3];
    value = value % 1009 + cta_rank();
    cta_sync();
    if (tid() == 0 && step + 2 < steps) mbarrier_expect(barriers + b, size * sizeof(Vec16));
    // Before a peer may send for the step after next, it has heard from this CTA in the next one, and so after this line.
    cta_sync();
  }
  p.out[bid() * 64 + tid()] = value;
  cluster_sync();
}

void gather_in_cluster(int size) {
  constexpr int kSteps = 7;
  Array<uint32_t> out(2 * size * 64), value(size);
  const int smem = piece_bytes<Vec16>(32) + piece_bytes<Mbarrier>(2);
  must_run(all_gather, clusters(2 * size, 64, size, smem), {nullptr, nullptr, out.data(), size << 16 | kSteps});
  for (int i = 0; i < size; ++i) value[i] = i + 1;
  for (int step = 0; step < kSteps; ++step) {
    uint32_t sum = 0;
    for (int i = 0; i < size; ++i) sum += value[i] * (i + 1) + value[i] + 1;
    for (int i = 0; i < size; ++i) value[i] = sum % 1009 + i;
  }
  for (int i = 0; i < out.count(); ++i)
    CHECK(out[i] == value[i / 64 % size], "%d is %u, not %u", i, out[i], value[i / 64 % size]);
}

void sends_to_all() { gather_in_cluster(8); }
void sends_to_oneself() { gather_in_cluster(1); }

// numbers

struct Conversions {
  const float* in;
  uint32_t *half, *bfloat16, *tf32;
  int count;
};

FASTSEQ_KERNEL(64) convert(FASTSEQ_PARAMETERS Conversions p) {
  for (int i = bid() * nthreads() + tid(); i < p.count; i += 64) {
    p.half[i] = from_float<Half>(p.in[i]).bits;
    p.bfloat16[i] = from_float<Bfloat16>(p.in[i]).bits;
    p.tf32[i] = to_tf32(p.in[i]);
  }
}

void roundings() {
  struct Known {
    uint32_t in, half, bfloat16, tf32;
  };
  const Known known[] = {
      {0x00000000, 0x0000, 0x0000, 0x00000000}, {0x80000000, 0x8000, 0x8000, 0x80000000},
      {0x3f800000, 0x3c00, 0x3f80, 0x3f800000}, {0xbfc00000, 0xbe00, 0xbfc0, 0xbfc00000},
      {0x3f801000, 0x3c00, 0x3f80, 0x3f802000},  // half: a tie, to even; tf32: a tie, away from zero
      {0x3f803000, 0x3c02, 0x3f80, 0x3f804000},  // half: a tie, to even
      {0xbf801000, 0xbc00, 0xbf80, 0xbf802000}, {0x3f801001, 0x3c01, 0x3f80, 0x3f802000},
      {0x3f808000, 0x3c04, 0x3f80, 0x3f808000},                                            // bfloat16: a tie, to even
      {0x3f818000, 0x3c0c, 0x3f82, 0x3f818000},                                            // bfloat16: a tie, to even
      {0x3f808001, 0x3c04, 0x3f81, 0x3f808000}, {0x477fe000, 0x7bff, 0x4780, 0x477fe000},  // half's largest
      {0x477fefff, 0x7bff, 0x4780, 0x477fe000}, {0x477ff000, 0x7c00, 0x4780, 0x47800000},  // half: to infinity
      {0x33800000, 0x0001, 0x3380, 0x33800000},                                            // half's smallest subnormal
      {0x33000000, 0x0000, 0x3300, 0x33000000},                                            // half: a tie, to even
      {0x33000001, 0x0001, 0x3300, 0x33000000}, {0x387fffff, 0x0400, 0x3880, 0x38800000},  // half: from subnormal to normal
      {0x387fc000, 0x03ff, 0x3880, 0x387fc000}, {0x7f7fffff, 0x7c00, 0x7f80, 0x7f800000},
      {0x7f800000, 0x7c00, 0x7f80, 0x7f800000}, {0xff800000, 0xfc00, 0xff80, 0xff800000},
      {0x00000001, 0x0000, 0x0000, 0x00000000}, {0x00400000, 0x0000, 0x0040, 0x00400000},
  };
  constexpr int kCount = sizeof(known) / sizeof(known[0]);
  Array<float> in(kCount + 1);
  Array<uint32_t> half(kCount + 1), bfloat16(kCount + 1), tf32(kCount + 1);
  for (int i = 0; i < kCount; ++i) std::memcpy(&in[i], &known[i].in, 4);
  in[kCount] = std::numeric_limits<float>::quiet_NaN();
  must_run(convert, plain(1, 64), {in.data(), half.data(), bfloat16.data(), tf32.data(), kCount + 1});
  for (int i = 0; i < kCount; ++i) {
    CHECK(half[i] == known[i].half, "%08x is %04x", known[i].in, half[i]);
    CHECK(bfloat16[i] == known[i].bfloat16, "%08x is %04x", known[i].in, bfloat16[i]);
    CHECK(tf32[i] == known[i].tf32, "%08x is %08x", known[i].in, tf32[i]);
  }
  CHECK((half[kCount] & 0x7fff) > 0x7c00 && (bfloat16[kCount] & 0x7fff) > 0x7f80 && (tf32[kCount] & 0x7fffe000) > 0x7f800000,
        "NaN");
}

struct Sixteen {
  uint32_t *half, *bfloat16, *half_again, *bfloat16_again;
};

FASTSEQ_KERNEL(256) widen(FASTSEQ_PARAMETERS Sixteen p) {
  for (int i = tid(); i < 65536; i += nthreads()) {
    const float half = to_float(Half{static_cast<uint16_t>(i)}), bfloat16 = to_float(Bfloat16{static_cast<uint16_t>(i)});
    p.half[i] = as_bits(half), p.half_again[i] = from_float<Half>(half).bits;
    p.bfloat16[i] = as_bits(bfloat16), p.bfloat16_again[i] = from_float<Bfloat16>(bfloat16).bits;
  }
}

void sixteen_bits() {
  Array<uint32_t> half(65536), bfloat16(65536), half_again(65536), bfloat16_again(65536);
  must_run(widen, plain(1, 256), {half.data(), bfloat16.data(), half_again.data(), bfloat16_again.data()});
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint32_t exponent = i >> 10 & 31, fraction = i & 0x3ff;
    float x;
    std::memcpy(&x, &half[i], 4);
    if (exponent == 31 && fraction) {
      CHECK(std::isnan(x), "%04x", i);
    } else {
      const double value = exponent == 31  ? std::numeric_limits<double>::infinity()
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
      CHECK(x == (i >> 15 ? -value : value) && std::signbit(x) == (i >> 15), "%04x is %g", i, x);
      CHECK(half_again[i] == i, "%04x comes back as %04x", i, half_again[i]);
    }
    CHECK(bfloat16[i] == i << 16, "%04x", i);
    if ((i & 0x7fff) <= 0x7f80) CHECK(bfloat16_again[i] == i, "%04x comes back as %04x", i, bfloat16_again[i]);
  }
}

FASTSEQ_KERNEL(32) transcend(FASTSEQ_PARAMETERS Floats p) {
  for (int i = tid(); i < 2048; i += 32) {
    const float x = p.in[i];
    p.out[i] = exp_exact(x);
    p.out[2048 + i] = tanh_exact(x);
    p.out[4096 + i] = divide_exact(x, 3.0f);
    p.out[6144 + i] = exp_fast(x);
    p.out[8192 + i] = divide_fast(x, 3.0f);
  }
}

// Bounds are those of the CUDA programming guide: expf 1 ulp, tanhf 2 (glibc's are smaller); __expf 2 + |1.173 x|, __fdividef 2.
void functions() {
  Array<float> in(2048), out(10240);
  for (int i = 0; i < 2048; ++i) in[i] = (i - 1024) * 0.06f + 0.01f;
  must_run(transcend, plain(1, 32), {in.data(), out.data()});
  const auto ulps = [](float got, double truth) {
    const float rounded = static_cast<float>(truth);
    return std::fabs(got - truth) /
           (std::nextafter(std::fabs(rounded), std::numeric_limits<float>::infinity()) - std::fabs(rounded));
  };
  for (int i = 0; i < 2048; ++i) {
    const double x = in[i];
    CHECK(ulps(out[i], std::exp(x)) <= 1.5, "exp_exact(%g) = %g", x, out[i]);
    CHECK(ulps(out[2048 + i], std::tanh(x)) <= 2.5, "tanh_exact(%g) = %g", x, out[2048 + i]);
    CHECK(out[4096 + i] == in[i] / 3.0f, "divide_exact(%g, 3) = %g", x, out[4096 + i]);
    CHECK(ulps(out[6144 + i], std::exp(x)) <= 2.5 + std::fabs(1.173 * x), "exp_fast(%g) = %g", x, out[6144 + i]);
    CHECK(ulps(out[8192 + i], x / 3) <= 2.5, "divide_fast(%g, 3) = %g", x, out[8192 + i]);
  }
}

FASTSEQ_KERNEL(32) extremes(FASTSEQ_PARAMETERS Floats p) {
  if (tid() == 0) {
    p.out[0] = exp_fast(p.in[0]);
    p.out[1] = exp_fast(-p.in[0]);
    p.out[2] = divide_fast(p.in[1], p.in[2]);
    p.out[3] = divide_fast(p.in[1], exp_fast(p.in[0]));
    p.out[4] = exp_exact(p.in[0]);
    p.out[5] = tanh_exact(p.in[0]);
  }
}

void ends_of_the_range() {
  Array<float> in(3), out(6, -1);
  in[0] = 100, in[1] = 1, in[2] = 2e38f;
  must_run(extremes, plain(1, 32), {in.data(), out.data()});
  CHECK(std::isinf(out[0]) && out[0] > 0, "%g", out[0]);
  CHECK(out[1] >= 0 && out[1] < 1e-37f, "%g: whether there are subnormal results is the compiler's choice", out[1]);
  CHECK(out[2] == 0, "%g: nothing divided by more than 2^126", out[2]);
  CHECK(out[3] == 0, "%g", out[3]);
  CHECK(std::isinf(out[4]) && out[5] == 1, "%g, %g", out[4], out[5]);
}

// products of small whole numbers, exact in any order

struct Product {
  const float *a, *b;  // [16, depth], [8, depth]
  float* d;            // [16, 8]
};

template <class T>
FASTSEQ_DEVICE uint32_t pair(const float* p) {
  return from_float<T>(p[0]).bits | static_cast<uint32_t>(from_float<T>(p[1]).bits) << 16;
}

template <class T>
FASTSEQ_KERNEL(32)
product_16(FASTSEQ_PARAMETERS Product p) {
  const int g = lane() / 4, t = lane() % 4;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = pair<T>(p.a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
    d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) b[i] = pair<T>(p.b + g * 16 + 2 * t + i * 8);
  mma_16816(d, a, b, T{});
  for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

FASTSEQ_KERNEL(32) product_tf32(FASTSEQ_PARAMETERS Product p) {
  const int g = lane() / 4, t = lane() % 4;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = to_tf32(p.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) b[i] = to_tf32(p.b[g * 8 + t + i * 4]);
  mma_1688_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// b by ldmatrix from rows [n][k] of half a warp
FASTSEQ_KERNEL(32) product_ldmatrix(FASTSEQ_PARAMETERS Product p) {
  Smem smem;
  auto* rows = smem.take<Bfloat16>(8 * 16);
  for (int i = tid(); i < 8 * 16; i += 32) rows[i] = from_float<Bfloat16>(p.b[i]);
  cta_sync();
  const int g = lane() / 4, t = lane() % 4;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = pair<Bfloat16>(p.a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
    d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  ldmatrix_x2(b, rows + lane() % 8 * 16 + lane() / 8 % 2 * 8);
  mma_16816(d, a, b, Bfloat16{});
  for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

void check_product(void (*kernel)(Product), int depth, int smem) {
  Array<float> a(16 * depth), b(8 * depth), d(16 * 8), expected(16 * 8);
  for (int i = 0; i < a.count(); ++i) a[i] = static_cast<float>(i * 37 % 17 - 8);
  for (int i = 0; i < b.count(); ++i) b[i] = static_cast<float>(i * 53 % 19 - 9);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = d[m * 8 + n] = static_cast<float>(m * 8 + n);
      for (int k = 0; k < depth; ++k) sum += a[m * depth + k] * b[n * depth + k];
      expected[m * 8 + n] = sum;
    }
  }
  must_run(kernel, plain(1, 32, smem), {a.data(), b.data(), d.data()});
  for (int i = 0; i < 128; ++i) CHECK(d[i] == expected[i], "%d, %d is %g, not %g", i / 8, i % 8, d[i], expected[i]);
}

void products_of_half() { check_product(product_16<Half>, 16, 0); }
void products_of_bfloat16() { check_product(product_16<Bfloat16>, 16, 0); }
void products_of_tf32() { check_product(product_tf32, 8, 0); }
void products_from_ldmatrix() { check_product(product_ldmatrix, 16, 256); }

FASTSEQ_DEVICE void load(uint32_t (&r)[2], const void* row) { ldmatrix_x2(r, row); }
FASTSEQ_DEVICE void load(uint32_t (&r)[4], const void* row) { ldmatrix_x4(r, row); }

template <int kMatrices>
FASTSEQ_KERNEL(32) load_matrices(FASTSEQ_PARAMETERS Words p) {
  Smem smem;
  auto* rows = smem.take<uint16_t>(32 * 24);  // rows 48 bytes apart
  for (int i = tid(); i < 32 * 24; i += 32) rows[i] = static_cast<uint16_t>(i);
  cta_sync();
  uint32_t r[kMatrices];
  load(r, rows + lane() % (8 * kMatrices) * 24 + 8);
  for (int i = 0; i < kMatrices; ++i) p.out[kMatrices * lane() + i] = r[i];
}

template <int kMatrices>
void matrices() {
  Array<uint32_t> out(32 * kMatrices);
  must_run(load_matrices<kMatrices>, plain(1, 32, piece_bytes<uint16_t>(32 * 24)), {nullptr, out.data()});
  for (uint32_t i = 0; i < 32 * kMatrices; ++i) {
    const uint32_t lane = i / kMatrices, first = (i % kMatrices * 8 + lane / 4) * 24 + 8 + lane % 4 * 2;
    CHECK(out[i] == (first | (first + 1) << 16), "%u is %08x", i, out[i]);
  }
}

// launches that cannot be

void refusals() {
  Array<Ids> ids(96);
  for (const Launch& how : {plain(1, 4096), plain(1, 96, 1 << 20), plain(0, 96)}) {
    CHECK(*harness::run(write_ids, how, IdsParams{ids.data()}), "block %d, smem %d, grid %d", how.block, how.smem, how.grid);
  }
  check_ids(plain(1, 96));
}

const harness::Test tests[] = {
    {"ids", ids, false},
    {"ids_in_clusters", ids_in_clusters, true},
    {"many_ctas", many_ctas, false},
    {"ragged_block", ragged_block, false},
    {"pieces", pieces, false},
    {"large_shared", large_shared, false},
    {"cta_syncs", cta_syncs, false},
    {"warp_syncs", warp_syncs, false},
    {"shuffles", shuffles, false},
    {"copies", copies, false},
    {"copies_of_published", copies_of_published, false},
    {"flags_in_a_chain", flags_in_a_chain, false},
    {"flags_of_all", flags_of_all, false},
    {"more_flags_than_lanes", more_flags_than_lanes, false},
    {"flags_wrap_around", flags_wrap_around, false},
    {"cluster_syncs", cluster_syncs, true},
    {"sends_in_a_ring", sends_in_a_ring, true},
    {"sends_to_all", sends_to_all, true},
    {"sends_to_oneself", sends_to_oneself, true},
    {"roundings", roundings, false},
    {"sixteen_bits", sixteen_bits, false},
    {"functions", functions, false},
    {"ends_of_the_range", ends_of_the_range, false},
    {"products_of_half", products_of_half, false},
    {"products_of_bfloat16", products_of_bfloat16, false},
    {"products_of_tf32", products_of_tf32, false},
    {"products_from_ldmatrix", products_from_ldmatrix, false},
    {"two_matrices", matrices<2>, false},
    {"four_matrices", matrices<4>, false},
    {"refusals", refusals, false},
};

}  // namespace

int main(int argc, char** argv) { return harness::main(tests, argc, argv); }
