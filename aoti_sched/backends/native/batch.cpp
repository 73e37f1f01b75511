#include "batch.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace aoti {

namespace {

constexpr std::size_t kMostDims = 64;  // torch's own bound

using Sizes = std::array<std::int64_t, kMostDims>;

void check(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

std::int64_t product(std::int64_t a, std::int64_t b) {
  std::int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result))
    throw std::length_error("a batch is larger than memory can be");
  return result;
}

// A tensor's memory and layout. The pointers are the tensor's own.
struct View {
  char* data = nullptr;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* strides = nullptr;
  std::size_t dims = 0;
};

View view_of(const Shim& shim, BorrowedHandle tensor) {
  std::int64_t dims = 0;
  std::int64_t* sizes = nullptr;
  std::int64_t* strides = nullptr;
  void* data = nullptr;
  check_torch(shim.get_dim(tensor, &dims), "get_dim");
  check_torch(shim.get_sizes(tensor, &sizes), "get_sizes");
  check_torch(shim.get_strides(tensor, &strides), "get_strides");
  check_torch(shim.get_data_ptr(tensor, &data), "get_data_ptr");
  return {static_cast<char*>(data), sizes, strides, static_cast<std::size_t>(dims)};
}

std::int32_t dtype_of(const Shim& shim, BorrowedHandle tensor) {
  std::int32_t dtype = 0;
  check_torch(shim.get_dtype(tensor, &dtype), "get_dtype");
  return dtype;
}

std::string number(std::size_t n) { return std::to_string(n); }

[[noreturn]] void misfit(std::size_t input, std::size_t member, const std::string& what) {
  throw std::runtime_error("input " + number(input) + " of request " + number(member) +
                           " of the batch " + what);
}

void fill(char* to, std::int64_t bytes, const std::string& element) {
  const std::size_t wanted = static_cast<std::size_t>(bytes);
  if (wanted == 0) return;
  if (std::all_of(element.begin(), element.end(), [&](char byte) { return byte == element[0]; })) {
    std::memset(to, element[0], wanted);
    return;
  }
  std::copy(element.begin(), element.end(), to);
  for (std::size_t there = element.size(); there < wanted;) {
    const std::size_t more = std::min(there, wanted - there);
    std::memcpy(to + there, to, more);
    there += more;
  }
}

// One member's box inside the whole, by levels: the dimensions from the outermost in memory. Steps
// are in bytes.
struct Box {
  std::size_t levels = 0;
  std::size_t rows = 0;   // the level of the rows, which are never padded
  std::size_t solid = 0;  // from this level inward the box is one run of bytes, in both memories
  std::int64_t run = 0;   // the length of that run
  std::int64_t element = 0;
  Sizes sizes;   // of the member
  Sizes wholes;  // of the member's part of the whole: larger where it is padded
  Sizes from;    // steps in the member
  Sizes to;      // steps in the whole
  const std::string* pad = nullptr;

  void find_solid() {
    solid = levels;
    run = element;
    std::int64_t inside = element;  // the step of the next level outward, if all is one run
    while (solid > 0 && to[solid - 1] == inside &&
           (from[solid - 1] == inside || sizes[solid - 1] <= 1)) {
      --solid;
      run = sizes[solid] * to[solid];
      inside = run;
    }
  }

  void copy(std::size_t level, const char* source, char* target) const {
    if (level >= solid) {
      if (run > 0) std::memcpy(target, source, static_cast<std::size_t>(run));
    } else {
      for (std::int64_t i = 0; i < sizes[level]; ++i) {
        copy(level + 1, source + i * from[level], target + i * to[level]);
      }
    }
    if (level < levels && wholes[level] > sizes[level]) fill_rest(level, target);
  }

  // Pads the rest of this level. Outside the rows' level, other members lie between.
  void fill_rest(std::size_t level, char* target) const {
    if (level > rows) {
      fill(target + sizes[level] * to[level], (wholes[level] - sizes[level]) * to[level], *pad);
    } else {
      for (std::int64_t i = sizes[level]; i < wholes[level]; ++i)
        fill_all(level + 1, target + i * to[level]);
    }
  }

  void fill_all(std::size_t level, char* target) const {
    if (level == rows) {
      fill(target, wholes[level] * to[level], *pad);
    } else {
      for (std::int64_t i = 0; i < wholes[level]; ++i) fill_all(level + 1, target + i * to[level]);
    }
  }
};

// Copies one input of all members into the staging memory.
class Gathering {
 public:
  Gathering(Batch& batch, std::size_t input, std::vector<View>& views)
      : batch_(batch),
        shim_(batch.plan->shim),
        plan_(batch.plan->inputs[input]),
        input_(input),
        views_(views) {
    const std::size_t inputs = batch.plan->inputs.size();
    const std::size_t dims = plan_.order.size();
    dtype_ = dtype_of(shim_, tensor(0, inputs));
    for (std::size_t member = 0; member < views_.size(); ++member)
      add(member, tensor(member, inputs));
    element_ = static_cast<std::int64_t>(shim_.dtype_element_size(dtype_));
    sizes_[plan_.dim] = batch.padded_rows;
    std::int64_t step = 1;
    for (std::size_t level = dims; level-- > 0;) {
      strides_[plan_.order[level]] = step;
      step = product(step, std::max<std::int64_t>(sizes_[plan_.order[level]], 1));
    }
    static_cast<void>(product(step, element_));
    elements_ = step;
  }

  // Returns a view of the filled memory.
  OwnedHandle into(Staging& staging) {
    const Staging::Memory& memory = staging.reserve(shim_, input_, elements_, dtype_);
    std::int64_t first = 0;
    for (std::size_t member = 0; member < views_.size(); ++member) {
      const std::int64_t rows = batch_.rows[member];
      if (rows > 0) copy(member, memory.data + first * strides_[plan_.dim] * element_);
      first += rows;
    }
    clear(memory.data, first);
    OwnedHandle whole(shim_.delete_tensor);
    check_torch(
        shim_.reinterpret_tensor(memory.tensor.get(), static_cast<std::int64_t>(plan_.order.size()),
                                 sizes_.data(), strides_.data(), 0, whole.receive()),
        "_reinterpret_tensor");
    return whole;
  }

 private:
  BorrowedHandle tensor(std::size_t member, std::size_t inputs) const {
    return static_cast<BorrowedHandle>(&batch_.tensors[member * inputs + input_]);
  }

  bool is_ragged(std::size_t dim) const {
    return std::find(plan_.ragged.begin(), plan_.ragged.end(), dim) != plan_.ragged.end();
  }

  // Checks that a member fits, and enlarges the whole to it.
  void add(std::size_t member, BorrowedHandle tensor) {
    const View view = views_[member] = view_of(shim_, tensor);
    if (view.dims != plan_.order.size()) {
      misfit(input_, member,
             "has " + number(view.dims) + " dimensions, not " + number(plan_.order.size()));
    }
    if (dtype_of(shim_, tensor) != dtype_)
      misfit(input_, member, "is of another dtype than that of the first");
    for (std::size_t dim = 0; dim < view.dims; ++dim) {
      const std::int64_t wanted = dim == plan_.dim ? batch_.rows[member]
                                  : member == 0    ? view.sizes[dim]
                                                   : sizes_[dim];
      if (dim != plan_.dim && is_ragged(dim)) {
        differs_ = differs_ || view.sizes[dim] != wanted;
        sizes_[dim] = std::max(view.sizes[dim], wanted);
      } else if (view.sizes[dim] != wanted) {
        misfit(input_, member,
               "has size " + std::to_string(view.sizes[dim]) + " in dimension " + number(dim) +
                   ", not " + std::to_string(wanted));
      } else {
        sizes_[dim] = wanted;
      }
    }
  }

  void copy(std::size_t member, char* target) const {
    const View& view = views_[member];
    Box box;
    box.levels = view.dims;
    box.element = element_;
    for (std::size_t level = 0; level < view.dims; ++level) {
      const std::size_t dim = plan_.order[level];
      box.sizes[level] = view.sizes[dim];
      box.wholes[level] = dim == plan_.dim ? view.sizes[dim] : sizes_[dim];
      if (dim == plan_.dim) box.rows = level;
      box.from[level] = view.strides[dim] * element_;
      box.to[level] = strides_[dim] * element_;
      if (box.wholes[level] == 0) return;
    }
    if (differs_) {
      const auto pad = plan_.pads.find(dtype_);
      if (pad == plan_.pads.end())
        misfit(input_, member, "is of a dtype that has no such value as it is padded with");
      box.pad = &pad->second;
    }
    box.find_solid();
    box.copy(0, view.data, target);
  }

  // Zeros the rows behind the members'.
  void clear(char* data, std::int64_t first) const {
    const std::int64_t surplus = batch_.padded_rows - first;
    const std::int64_t row = strides_[plan_.dim] * element_;
    if (surplus == 0) return;
    std::int64_t blocks = 1;  // of rows: the product of the levels outside the rows' level
    for (std::size_t level = 0; plan_.order[level] != plan_.dim; ++level)
      blocks *= sizes_[plan_.order[level]];
    for (const std::size_t dim : plan_.order) {
      if (sizes_[dim] == 0) return;
    }
    for (std::int64_t block = 0; block < blocks; ++block) {
      std::memset(data + (block * batch_.padded_rows + first) * row, 0,
                  static_cast<std::size_t>(surplus * row));
    }
  }

  Batch& batch_;
  const Shim& shim_;
  const InputPlan& plan_;
  const std::size_t input_;
  std::vector<View>& views_;
  std::int32_t dtype_ = 0;
  std::int64_t element_ = 0;
  std::int64_t elements_ = 0;
  bool differs_ = false;
  Sizes sizes_;    // of the whole
  Sizes strides_;  // of the whole, in elements
};

[[noreturn]] void wrong_output(std::size_t output, const std::string& what) {
  throw std::runtime_error("output " + number(output) + " of a batch " + what);
}

}  // namespace

// --- Plan
// -------------------------------------------------------------------------------------------------

Plan::Plan(Shim its_shim, std::vector<InputPlan> its_inputs, std::vector<OutputPlan> its_outputs,
           bool detaches)
    : shim(its_shim),
      inputs(std::move(its_inputs)),
      outputs(std::move(its_outputs)),
      detach_rows(detaches) {
  for (const InputPlan& input : inputs) {
    const std::size_t dims = input.order.size();
    check(dims <= kMostDims, "an input has too many dimensions");
    check(input.dim < dims, "an input has no such dimension as its rows'");
    std::vector<bool> seen(dims, false);
    for (const std::size_t dim : input.order) {
      check(dim < dims && !seen[dim], "an input's order must name each of its dimensions once");
      seen[dim] = true;
    }
    for (const std::size_t dim : input.ragged) {
      check(dim < dims && dim != input.dim,
            "a ragged dimension of an input must be another than its rows'");
    }
    for (const auto& [dtype, pad] : input.pads) {
      check(pad.size() == shim.dtype_element_size(dtype), "a pad must be as long as an element");
    }
  }
  for (const OutputPlan& output : outputs) {
    for (const RaggedOut& cut : output.ragged) {
      check(cut.dim != output.dim,
            "a ragged dimension of an output must be another than its rows'");
      check(cut.input < inputs.size() && cut.input_dim < inputs[cut.input].order.size(),
            "a ragged dimension of an output is of no input");
    }
  }
}

// --- Staging ----------------------------------------------------------------------------------

const Staging::Memory& Staging::reserve(const Shim& shim, std::size_t input, std::int64_t elements,
                                        std::int32_t dtype) {
  if (memories_.size() <= input) memories_.resize(input + 1);
  Memory& memory = memories_[input];
  if (memory.tensor && memory.dtype == dtype && memory.elements >= elements) return memory;
  // Twice the size before, so that batches that grow row by row don't each make it again.
  const std::int64_t twice = memory.dtype == dtype ? memory.elements * 2 : 0;
  memory = Memory();
  const std::int64_t size = std::max(elements, twice);
  const std::int64_t stride = 1;
  OwnedHandle tensor(shim.delete_tensor);
  void* data = nullptr;
  check_torch(shim.empty_strided(1, &size, &stride, dtype, shim.cpu, 0, tensor.receive()),
              "empty_strided");
  check_torch(shim.get_data_ptr(tensor.get(), &data), "get_data_ptr");
  memory.tensor = std::move(tensor);
  memory.data = static_cast<char*>(data);
  memory.elements = size;
  memory.bytes = size * static_cast<std::int64_t>(shim.dtype_element_size(dtype));
  memory.dtype = dtype;
  return memory;
}

void Staging::give_up(const void* data) {
  for (Memory& memory : memories_) {
    const char* const address = static_cast<const char*>(data);
    if (!memory.tensor || address < memory.data || address >= memory.data + memory.bytes) continue;
    memory = Memory();
  }
}

// --- Batch
// ------------------------------------------------------------------------------------------------

Batch::Batch(std::shared_ptr<const Plan> its_plan, std::shared_ptr<Staging> its_staging,
             std::vector<BorrowedHandle> its_tensors, std::vector<std::int64_t> its_rows,
             std::int64_t its_padded_rows)
    : plan(std::move(its_plan)),
      staging(std::move(its_staging)),
      tensors(std::move(its_tensors)),
      rows(std::move(its_rows)),
      padded_rows(its_padded_rows) {
  check(!rows.empty(), "a batch has no members");
  check(tensors.size() == rows.size() * plan->inputs.size(), "a batch has other members than rows");
  std::int64_t left = padded_rows;
  for (const std::int64_t count : rows) {
    check(count >= 0 && count <= left, "a batch has more rows than its run");
    left -= count;
  }
}

OwnedHandles gather(Batch& batch) {
  std::vector<View> views(batch.rows.size());
  OwnedHandles inputs(batch.plan->shim.delete_tensor, batch.plan->inputs.size());
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    static_cast<void>(inputs.exchange(input, Gathering(batch, input, views).into(*batch.staging)));
  }
  return inputs;
}

OwnedHandles split(Batch& batch, const OwnedHandles& outputs) {
  const Plan& plan = *batch.plan;
  const Shim& shim = plan.shim;
  const std::size_t inputs = plan.inputs.size();
  OwnedHandles parts(shim.delete_tensor, batch.rows.size() * outputs.size());
  for (std::size_t output = 0; output < outputs.size(); ++output) {
    if (outputs[output] == nullptr) continue;
    const OutputPlan& how = plan.outputs[output];
    const View whole = view_of(shim, outputs[output]);
    check(whole.dims <= kMostDims, "an output has too many dimensions");
    if (how.dim >= whole.dims) {
      wrong_output(output, "has " + number(whole.dims) +
                               " dimensions, and its rows should be in dimension " +
                               number(how.dim));
    }
    if (whole.sizes[how.dim] != batch.padded_rows) {
      wrong_output(output, "has " + std::to_string(whole.sizes[how.dim]) + " rows in dimension " +
                               number(how.dim) + ", expected " + std::to_string(batch.padded_rows));
    }
    Sizes sizes;
    std::copy_n(whole.sizes, whole.dims, sizes.begin());
    std::int64_t first = 0;
    for (std::size_t member = 0; member < batch.rows.size(); ++member) {
      sizes[how.dim] = batch.rows[member];
      for (const RaggedOut& cut : how.ragged) {
        const View of =
            view_of(shim, static_cast<BorrowedHandle>(&batch.tensors[member * inputs + cut.input]));
        if (cut.dim >= whole.dims || cut.input_dim >= of.dims ||
            of.sizes[cut.input_dim] > whole.sizes[cut.dim]) {
          wrong_output(output, "is shorter in dimension " + number(cut.dim) + " than input " +
                                   number(cut.input) + " of request " + number(member) +
                                   " in dimension " + number(cut.input_dim));
        }
        sizes[cut.dim] = of.sizes[cut.input_dim];
      }
      OwnedHandle part(shim.delete_tensor);
      check_torch(shim.reinterpret_tensor(outputs[output], static_cast<std::int64_t>(whole.dims),
                                          sizes.data(), whole.strides,
                                          first * whole.strides[how.dim], part.receive()),
                  "_reinterpret_tensor");
      if (plan.detach_rows) {
        OwnedHandle copy(shim.delete_tensor);
        check_torch(shim.clone(part.get(), copy.receive()), "clone");
        part = std::move(copy);
      }
      static_cast<void>(parts.exchange(member * outputs.size() + output, std::move(part)));
      first += batch.rows[member];
    }
    if (!plan.detach_rows) batch.staging->give_up(whole.data);
  }
  return parts;
}

}  // namespace aoti
