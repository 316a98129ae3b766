// What the host execution sees that a GPU would let pass, hang on or answer with nonsense: each kernel does one thing wrong.
// And what it counts. For the host alone.

#include "harness.h"

using namespace fastseq::gpu;
using harness::Array;

namespace {

struct Params {
  uint32_t* words;
  int mode;
};

constexpr Launch plain(int grid, int block, int smem = 0) { return {grid, block, 1, smem, false, nullptr}; }
constexpr Launch cooperative(int grid, int block, int smem = 0) { return {grid, block, 1, smem, true, nullptr}; }
constexpr Launch clusters(int size, int smem) { return {size, 32, size, smem, false, nullptr}; }

void fails(void (*kernel)(Params), const Launch& how, const char* expected, int mode = 0) {
  Array<uint32_t> words(256);
  const char* error = harness::run(kernel, how, Params{words.data(), mode});
  CHECK(*expected ? std::strstr(error, expected) != nullptr : !*error, "\"%s\", not \"%s\"", error, expected);
  if (std::strncmp(error, "deadlock", 8) == 0) {
    CHECK(std::strstr(error, "misuse.cu:"), "\"%s\" names no line", error);
  } else if (*error) {
    CHECK(std::strstr(error, "misuse.cu:") && std::strstr(error, "(CTA ") && std::strstr(error, "FASTSEQ_HOST_SEED="), "\"%s\"",
          error);
  }
}

// barriers

FASTSEQ_KERNEL(64) sync_in_one_warp(FASTSEQ_PARAMETERS Params) {
  if (warp() == 0) cta_sync();
}
FASTSEQ_KERNEL(64) two_syncs(FASTSEQ_PARAMETERS Params) {
  if (lane() == 0) {
    cta_sync();
  } else {
    cta_sync();
  }
}
FASTSEQ_KERNEL(64) sync_waits_for_flag(FASTSEQ_PARAMETERS Params p) {
  if (warp() == 0) flags_wait(p.words, 1, 3);
  cta_sync();
}
FASTSEQ_KERNEL(32) cluster_sync_in_one_cta(FASTSEQ_PARAMETERS Params) {
  if (cta_rank() == 0) cluster_sync();
}

void barriers() {
  fails(sync_in_one_warp, plain(1, 64), "cta_sync");
  fails(two_syncs, plain(1, 64), "cta_sync, while other lanes of the warp are in the one at line");
  fails(sync_waits_for_flag, cooperative(1, 64), "deadlock: ");
  fails(sync_waits_for_flag, cooperative(1, 64), "32 threads wait in cta_sync at ");
  fails(sync_waits_for_flag, cooperative(1, 64), "(a flag is 0 and has to reach 3)");
  fails(cluster_sync_in_one_cta, clusters(2, 0), "cluster_sync");
}

// collectives

FASTSEQ_KERNEL(32) one_lane_missing(FASTSEQ_PARAMETERS Params p) {
  if (lane() == 7) return;
  p.words[lane()] = static_cast<uint32_t>(shuffle_xor(1.0f, 1));
}
FASTSEQ_KERNEL(32) one_lane_late(FASTSEQ_PARAMETERS Params) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (lane() == 7) {
    mma_16816(d, a, b, Half{});
  } else {
    warp_sync();
  }
}
FASTSEQ_KERNEL(40) mma_by_eight(FASTSEQ_PARAMETERS Params) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_16816(d, a, b, Half{});
}

void collectives() {
  fails(one_lane_missing, plain(1, 32), "shuffle_xor");
  fails(one_lane_late, plain(1, 32), "while other lanes of the warp are in");
  fails(mma_by_eight, plain(1, 40), "mma by a warp of only 8 lanes");
}

// shared memory

FASTSEQ_KERNEL(32) takes_too_much(FASTSEQ_PARAMETERS Params) {
  Smem smem;
  smem.take<float>(32);
  smem.take<float>(33);
}
FASTSEQ_KERNEL(32) matrix_from_odd_row(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* rows = smem.take<unsigned char>(1024);
  uint32_t r[2];
  ldmatrix_x2(r, rows + 16 * lane() + p.mode);
}
[[maybe_unused]] FASTSEQ_KERNEL(32) writes_past_the_end(FASTSEQ_PARAMETERS Params) {
  Smem smem;
  auto* words = smem.take<uint32_t>(32);
  words[lane() + 1] = 0;
}
FASTSEQ_KERNEL(32) reads_unwritten(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  p.words[lane()] = smem.take<uint32_t>(32)[lane()];
}

void shared_memory() {
  fails(takes_too_much, plain(1, 32, 256), "the kernel takes 384 bytes of shared memory, launched with 256");
  fails(matrix_from_odd_row, plain(1, 32, 1024), "not aligned to 16 bytes", 8);
  fails(matrix_from_odd_row, plain(1, 32, 1024), "outside of every piece of the CTA's shared memory", 1024);
#if !defined(__SANITIZE_ADDRESS__)
  Array<uint32_t> words(32);
  const char* error = harness::run(writes_past_the_end, plain(1, 32, 128), Params{words.data(), 0});
  CHECK(std::strstr(error, "the CTA wrote past its shared memory"), "%s", error);
#endif
  Array<uint32_t> unwritten(32);
  harness::must_run(reads_unwritten, plain(1, 32, 128), Params{unwritten.data(), 0});
  for (int i = 0; i < 32; ++i) CHECK(unwritten[i] == 0xffffffff, "shared memory begins as NaN");
}

// copies

FASTSEQ_KERNEL(32) copies_wrongly(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(128);
  const uint32_t* from = p.mode == 3 ? words : p.words;
  cp_async16(words + 4 * lane() + (p.mode == 0) + 4 * (p.mode == 1), from + (p.mode == 2));
  cp_commit();
  if (p.mode != 4) cp_wait<0>();
}
FASTSEQ_KERNEL(32) waits_for_too_little(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* words = smem.take<uint32_t>(128);
  cp_async16(words + 4 * lane(), p.words + 4 * lane());
  cp_commit();
  cp_wait<1>();
  p.words[128 + lane()] = words[4 * lane()];
  cp_wait<0>();
}

void copies() {
  fails(copies_wrongly, plain(1, 32, 512), "not aligned to 16 bytes", 0);
  fails(copies_wrongly, plain(1, 32, 512), "writes outside of every piece of the CTA's shared memory", 1);
  fails(copies_wrongly, plain(1, 32, 512), "not aligned to 16 bytes", 2);
  fails(copies_wrongly, plain(1, 32, 512), "from shared memory", 3);
  fails(copies_wrongly, plain(1, 32, 512), "without having waited for this cp_async16", 4);
  host::choose(host::Schedule::kFirst, host::Landing::kLate);
  Array<uint32_t> words(256, 5);
  harness::must_run(waits_for_too_little, plain(1, 32, 512), Params{words.data(), 0});
  for (int i = 0; i < 32; ++i) CHECK(words[128 + i] == 0xffffffff, "a copy that lands late is NaN till then");
}

// mbarriers

FASTSEQ_KERNEL(32) misuses_mbarrier(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* data = smem.take<Vec16>(32);
  auto* barrier = smem.take<Mbarrier>(1);
  const int other = 1 - cta_rank();
  if (p.mode == 0) mbarrier_wait(barrier, 0);
  mbarrier_init(barrier, 1, 512);
  cluster_sync();
  switch (p.mode) {
    case 1:
      if (tid() == 0) mbarrier_expect(barrier, 512);
      break;
    case 2:
      barrier->state = 0;
      mbarrier_wait(barrier, 0);
      break;
    case 3:  // too little is sent
      if (tid() < 31) st_async(peer(data, other) + lane(), {}, peer(barrier, other));
      mbarrier_wait(barrier, 0);
      break;
    case 4:  // to a CTA that does not wait
      if (cta_rank() == 0) st_async(peer(data, other) + lane(), {}, peer(barrier, other));
      break;
    case 5: st_async(peer(data, other) + lane(), {}, peer(barrier, 1 - other)); break;
    case 6: mbarrier_init(barrier, 1, 512); break;
    case 7: st_async(peer(data + 1, other) + 31 + 8 + lane(), {}, peer(barrier, other)); break;
    case 8: mbarrier_wait(barrier, 2); break;
    case 9: peer(barrier, 2); break;
  }
  cluster_sync();
}
FASTSEQ_KERNEL(32) rearms_too_early(FASTSEQ_PARAMETERS Params) {
  Smem smem;
  auto* data = smem.take<Vec16>(32);
  auto* barrier = smem.take<Mbarrier>(1);
  mbarrier_init(barrier, 1, 16);
  cluster_sync();
  for (int phase = 0; phase < 2; ++phase) {
    if (lane() == 0) {
      st_async(peer(data, 0), {}, peer(barrier, 0));
      mbarrier_wait(barrier, phase);
      if (phase == 0) mbarrier_expect(barrier, 16);  // though the others may not have seen the phase complete
    } else {
      mbarrier_wait(barrier, phase);
    }
  }
}

void mbarriers() {
  const int smem = piece_bytes<Vec16>(32) + piece_bytes<Mbarrier>(1);
  fails(misuses_mbarrier, clusters(2, smem), "never initialized, or overwritten", 0);
  fails(misuses_mbarrier, clusters(2, smem), "a second arrival in one phase", 1);
  fails(misuses_mbarrier, clusters(2, smem), "never initialized, or overwritten", 2);
  fails(misuses_mbarrier, clusters(2, smem), "(phase 0 misses 0 arrivals and 16 bytes)", 3);
  fails(misuses_mbarrier, clusters(2, smem), "st_async to one CTA counts on an mbarrier of another", 5);
  fails(misuses_mbarrier, clusters(2, smem), "an mbarrier initialized twice", 6);
  fails(misuses_mbarrier, clusters(2, smem), "outside of every piece of the peer's shared memory", 7);
  fails(misuses_mbarrier, clusters(2, smem), "parity 2", 8);
  fails(misuses_mbarrier, clusters(2, smem), "peer 2 in a cluster of 2", 9);
  host::choose(host::Schedule::kFirst, host::Landing::kLate);
  fails(misuses_mbarrier, clusters(2, smem), "the CTA ends while an st_async is on its way to it", 4);
  bool seen = false;
  for (int seed = 0; seed < 48 && !seen; ++seed) {
    host::seed(seed);
    const char* error = harness::run(rearms_too_early, clusters(1, smem), Params{nullptr, 0});
    seen = std::strstr(error, "went through two phases") || std::strstr(error, "deadlock");
  }
  CHECK(seen, "no seed has shown it");
}

FASTSEQ_KERNEL(32) sends_to_the_dead(FASTSEQ_PARAMETERS Params) {
  Smem smem;
  auto* data = smem.take<Vec16>(32);
  auto* barrier = smem.take<Mbarrier>(1);
  mbarrier_init(barrier, 1, 512);
  cluster_sync();
  if (cta_rank() == 0) st_async(peer(data, 1) + lane(), {}, peer(barrier, 1));
}

void ends() {
  host::choose(host::Schedule::kLast, host::Landing::kAtOnce);
  fails(sends_to_the_dead, clusters(2, piece_bytes<Vec16>(32) + piece_bytes<Mbarrier>(1)),
        "sends to CTA 1 of the cluster, which has ended");
}

// CTAs that wait for one another, without being promised to run at the same time

FASTSEQ_KERNEL(32) meets_in_memory(FASTSEQ_PARAMETERS Params p) {
  flag_publish(p.words + bid(), 1);
  flags_wait(p.words, 3, 1);
}

void residence() {
  host::choose(host::Schedule::kRandom, host::Landing::kRandom);
  fails(meets_in_memory, plain(3, 32), "the launch is not cooperative");
  fails(meets_in_memory, cooperative(3, 32), "");
}

// the same seed is the same run, another seed another one

FASTSEQ_KERNEL(64) counts(FASTSEQ_PARAMETERS Params p) {
  for (int i = 0; i < 20; ++i) {
    if (warp() == 0) flag_publish(p.words + bid(), i + 1);
    if (warp() == 1) flags_wait(p.words, 4, i + 1);
    if (i % 7 == 0) cta_sync();
  }
}

uint64_t switches(uint64_t seed) {
  Array<uint32_t> words(4);
  host::seed(seed);
  host::reset_counters();
  harness::must_run(counts, cooperative(4, 64), Params{words.data(), 0});
  return host::counters().switches;
}

void seeds() {
  int different = 0;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const uint64_t once = switches(seed);
    CHECK(switches(seed) == once, "seed %d", static_cast<int>(seed));
    different += switches(seed + 12) != once;
  }
  CHECK(different == 12, "%d of 12 seeds differ from those 12 later", different);
}

// what is counted

FASTSEQ_KERNEL(32) moves(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* data = smem.take<Vec16>(64);
  auto* barrier = smem.take<Mbarrier>(1);
  mbarrier_init(barrier, 1, 512);
  cluster_sync();
  st_async(peer(data, 1 - cta_rank()) + lane(), {}, peer(barrier, 1 - cta_rank()));
  cp_async16(data + 32 + lane(), p.words + 4 * lane());
  cp_commit();
  cp_wait<0>();
  mbarrier_wait(barrier, 0);
  warp_sync();
  uint32_t r[2];
  ldmatrix_x2(r, data + lane() % 16);     // rows one after another: no conflicts
  ldmatrix_x2(r, data + lane() % 8 * 8);  // all in the same banks: eight wavefronts each instead of one
  ldmatrix_x2(r, data + lane() % 8 * 2);  // every other: two each
  float d[4] = {};
  const uint32_t a[4] = {};
  mma_16816(d, a, r, Bfloat16{});
}

void counters() {
  Array<uint32_t> words(128);
  host::reset_counters();
  harness::must_run(moves, clusters(2, piece_bytes<Vec16>(64) + piece_bytes<Mbarrier>(1)), Params{words.data(), 0});
  const host::Counters seen = host::counters();
  CHECK(seen.st_async == 64 && seen.st_async_bytes == 1024, "%d", static_cast<int>(seen.st_async));
  CHECK(seen.cp_async == 64 && seen.cp_async_bytes == 1024, "%d", static_cast<int>(seen.cp_async));
  CHECK(seen.ldmatrix == 6 && seen.mma == 2 && seen.cluster_syncs == 1, "%d", static_cast<int>(seen.ldmatrix));
  CHECK(seen.bank_conflicts == 2 * (0 + 14 + 2), "%d", static_cast<int>(seen.bank_conflicts));
}

const harness::Test tests[] = {
    {"barriers", barriers, true},           {"collectives", collectives, true},
    {"shared_memory", shared_memory, true}, {"copies", copies, true},
    {"mbarriers", mbarriers, true},         {"ends", ends, true},
    {"residence", residence, true},         {"seeds", seeds, true},
    {"counters", counters, true},
};

}  // namespace

int main(int argc, char** argv) { return harness::main(tests, argc, argv); }
