// The planner and the recurrent kernels, executed on the host, for Python: tests only, never in the shipped library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "limits/exchange.h"
#include "recurrent/run.cuh"
#include "execution.h"

namespace py = pybind11;

namespace fastseq::recurrent {
namespace {

// Of a call's arguments, by name: an address or None.
template <class T>
T* pointer(const py::dict& given, const char* name) {
  const py::object value = given[name];
  return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

Walk walk(const py::dict& given) {
  const auto number = [&](const char* name) { return given[name].cast<int32_t>(); };
  return {pointer<const int64_t>(given, "starts"), pointer<const int64_t>(given, "lengths"), number("steps"), number("batch"),
          number("lanes"), number("hidden"), given["reverse"].cast<uint64_t>()};
}

ExchangeBuffers buffers(const py::dict& given) { return {pointer<void>(given, "operands"), pointer<uint32_t>(given, "flags")}; }

Resets resets(const py::dict& given, float* dh = nullptr, float* dc = nullptr) {
  return {pointer<const uint8_t>(given, "resets"), pointer<const void>(given, "reset_h"), pointer<const float>(given, "reset_c"), dh,
          dc};
}

template <class Params>
void run_kernels(const std::string& cell_name, const std::string& precision_name, const std::vector<int64_t>& numbers,
                 const Params& params) {
  Cell cell{};
  Precision precision{};
  if (!find(cell_name, cell) || !find(precision_name, precision)) {
    throw py::value_error("no kernel for " + cell_name + ", " + precision_name);
  }
  const std::string error = run(plan_of(numbers), cell, precision, params, nullptr);
  if (!error.empty()) throw std::runtime_error(error);
}

void forward(const std::string& cell, const std::string& precision, const std::vector<int64_t>& plan, const py::dict& g) {
  run_kernels(cell, precision, plan, ForwardParams{
      pointer<const void>(g, "x_gates"), pointer<const void>(g, "weight"), pointer<const void>(g, "vectors"), pointer<const void>(g, "h0"),
      pointer<const float>(g, "c0"), pointer<void>(g, "y"), pointer<void>(g, "h_n"), pointer<float>(g, "c_n"), pointer<float>(g, "c"),
      pointer<void>(g, "gates"), walk(g), {}, buffers(g), resets(g)});
}

void backward(const std::string& cell, const std::string& precision, const std::vector<int64_t>& plan, const py::dict& g) {
  run_kernels(cell, precision, plan, BackwardParams{
      pointer<const void>(g, "dy"), pointer<const void>(g, "dh_n"), pointer<const float>(g, "dc_n"), pointer<const float>(g, "dc"),
      pointer<const void>(g, "weight"), pointer<const void>(g, "vectors"), pointer<const void>(g, "h0"), pointer<const float>(g, "c0"),
      pointer<const void>(g, "y"), pointer<const float>(g, "c"), pointer<const void>(g, "gates"), pointer<void>(g, "dgates"),
      pointer<void>(g, "drecurrent"), pointer<void>(g, "dh0"), pointer<float>(g, "dc0"), walk(g), {}, buffers(g),
      resets(g, pointer<float>(g, "dreset_h"), pointer<float>(g, "dreset_c"))});
}

void exchange(const std::string& kind, int steps, int ctas, int vectors, uintptr_t flags, uintptr_t operands, uintptr_t results) {
  const limits::ExchangeParams params{reinterpret_cast<uint32_t*>(flags), reinterpret_cast<void*>(operands),
                                      reinterpret_cast<uint32_t*>(results), steps, ctas, vectors};
  const std::string error = limits::exchange(kind, params, nullptr);
  if (!error.empty()) throw std::runtime_error(error);
}

py::dict counters() {
  const gpu::host::Counters c = gpu::host::counters();
  py::dict found;
  found["st_async"] = c.st_async, found["st_async_bytes"] = c.st_async_bytes;
  found["cp_async"] = c.cp_async, found["cp_async_bytes"] = c.cp_async_bytes;
  found["flags_published"] = c.flags_published, found["flags_waited"] = c.flags_waited;
  found["cta_syncs"] = c.cta_syncs, found["cluster_syncs"] = c.cluster_syncs;
  found["mma"] = c.mma, found["ldmatrix"] = c.ldmatrix, found["bank_conflicts"] = c.bank_conflicts;
  return found;
}

}  // namespace
}  // namespace fastseq::recurrent

PYBIND11_MODULE(fastseq_host, m) {
  m.def("forward", &fastseq::recurrent::forward);
  m.def("backward", &fastseq::recurrent::backward);
  m.def("exchange", &fastseq::recurrent::exchange);
  m.def("seed", &fastseq::gpu::host::seed);
  m.def("counters", &fastseq::recurrent::counters);
  m.def("reset_counters", &fastseq::gpu::host::reset_counters);
}
