// Batches under a sanitizer: producers that make them of random members, on the lanes and on their
// own threads, over models that fail in every way, and a torch that refuses a call now and then.
//
// The arguments are the seed and the number of rounds. Returns 0 when every member got its own rows
// or its batch an error, no result was written over by a later batch, and no tensor is left.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <poll.h>

#include "lane.hpp"
#include "model_library.h"
#include "scripted.hpp"

namespace {

using scripted::shim;

constexpr int kProducers = 3;
constexpr int kBatches = 80;  // of each producer, in each round
constexpr std::int64_t kColumns = 5;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  // A usual exit looks for leaks, and then hangs where another thread is reporting an error.
  std::_Exit(1);
}

aoti::Runtime runtime() {
  aoti::Runtime made;
  made.delete_tensor = &torch_delete_tensor;
  made.root_cause = &torch_root_cause;
  made.new_handle = &torch_another_handle;
  return made;
}

std::shared_ptr<const aoti::Plan> make_plan(std::size_t inputs, std::size_t outputs, bool ragged,
                                            bool detach) {
  aoti::InputPlan input{0, {0, 1}, {}, {}};
  aoti::OutputPlan output{0, {}};
  if (ragged) {
    input.ragged = {1};
    input.pads = {{1, std::string("\x07")}, {4, std::string("\x01\x02\x03\x04")}};
    output.ragged = {{1, 0, 1}};
  }
  return std::make_shared<const aoti::Plan>(shim(), std::vector<aoti::InputPlan>(inputs, input),
                                            std::vector<aoti::OutputPlan>(outputs, output), detach);
}

struct Scripted {
  container script{};
  std::shared_ptr<aoti::Model> model = std::make_shared<aoti::Model>();
  std::shared_ptr<const aoti::Plan> plan;
  std::map<std::size_t, std::shared_ptr<aoti::Staging>>
      stagings;  // by lane, and behind those by producer
};

enum { kPassesOn = 1, kMoreRows, kFewerRows, kFails, kThrows, kLeavesOut, kWays };

std::unique_ptr<Scripted> make_model(int way, std::size_t slots, std::mt19937& random) {
  auto made = std::make_unique<Scripted>();
  container& script = made->script;
  script.stolen = way == kThrows ? 1 : 3;
  // Not of too many rows: where torch refuses the one output, nothing would be left that is wrong.
  script.again = way != kLeavesOut && way != kMoreRows && random() % 2 == 0 ? 2 : 0;
  script.made = way == kLeavesOut || script.again ? 1 : 3;
  script.passes_on = way == kPassesOn;
  script.more_rows = way == kMoreRows ? 1 : way == kFewerRows ? -1 : 0;
  script.error = "scripted";
  script.status = way == kFails;
  script.throws = way == kThrows ? THROWS_STANDARD : THROWS_NOTHING;
  made->model->run = reinterpret_cast<aoti::RunFunction>(&row_model_run);
  made->model->container = &script;
  made->model->num_inputs = 1 + random() % 2;
  made->model->num_outputs = 2;
  made->model->last_error = &model_last_error;
  made->plan = make_plan(made->model->num_inputs, 2, random() % 2 == 0, random() % 3 == 0);
  for (std::size_t slot = 0; slot < slots; ++slot)
    made->stagings[slot] = std::make_shared<aoti::Staging>();
  return made;
}

// What is known of a batch until it comes back.
struct Asked {
  Scripted* model = nullptr;
  int way = 0;
  std::vector<aoti::Handle> tensors;
  std::vector<std::int64_t> rows;
  std::vector<std::int64_t> columns;
  std::vector<int> values;
};

// A member's output, and what it must be for ever.
struct Kept {
  aoti::OwnedHandle tensor;
  std::int64_t rows;
  std::int64_t columns;
  int value;
};

struct Round {
  explicit Round(std::mt19937& random) : count(1 + random() % 3), refuses(random() % 2 == 0) {
    for (int way = 0; way < kWays; ++way)
      models.push_back(make_model(way, count + kProducers, random));
    lanes =
        std::make_unique<aoti::Lanes>(runtime(), std::vector<std::string>(count, "aoti:batches"),
                                      std::vector<int>(), static_cast<int>(random() % 5));
  }

  std::vector<std::unique_ptr<Scripted>> models;
  std::size_t count;
  bool refuses;
  std::atomic<std::uint64_t> tokens{0};
  std::atomic<int> succeeded{0};
  std::mutex mutex;
  std::map<std::uint64_t, Asked> asked;  // guarded by mutex
  std::vector<Kept> kept;                // guarded by mutex
  std::unique_ptr<aoti::Lanes> lanes;
};

// A matrix, also where torch is about to refuse.
aoti::Handle matrix(std::int64_t rows, std::int64_t columns, std::int32_t dtype, int value) {
  aoti::Handle made = nullptr;
  while (made == nullptr) made = new_matrix(rows, columns, dtype, value);
  return made;
}

aoti::Work ask(Round& round, std::mt19937& random, std::size_t slot, Asked& asked) {
  asked.way = static_cast<int>(random() % kWays);
  asked.model = round.models[static_cast<std::size_t>(asked.way)].get();
  const aoti::Plan& plan = *asked.model->plan;
  const bool ragged = !plan.inputs[0].ragged.empty();
  const std::int32_t dtype = random() % 2 == 0 ? 1 : 4;
  std::int64_t total = 0;
  for (std::size_t member = 0, members = 1 + random() % 6; member < members; ++member) {
    asked.rows.push_back(static_cast<std::int64_t>(random() % 4));
    asked.columns.push_back(ragged ? static_cast<std::int64_t>(random() % 6) : kColumns);
    asked.values.push_back(static_cast<int>(random() % 200));
    for (std::size_t input = 0; input < plan.inputs.size(); ++input) {
      asked.tensors.push_back(
          matrix(asked.rows.back(), asked.columns.back(), dtype, asked.values.back()));
    }
    total += asked.rows.back();
  }
  aoti::Work work;
  work.token = ++round.tokens;
  work.model = asked.model->model;
  work.batch = std::make_unique<aoti::Batch>(asked.model->plan, asked.model->stagings.at(slot),
                                             asked.tensors, asked.rows,
                                             total + static_cast<std::int64_t>(random() % 3));
  if (round.refuses && random() % 4 == 0) refuse_torch_call(1 + static_cast<int>(random() % 60));
  return work;
}

void answer(Round& round, Asked& asked, aoti::Completion& completion) {
  const std::size_t outputs = asked.model->model->num_outputs;
  check(completion.members == asked.rows.size(), "a batch comes back with its members");
  if (asked.way == kFails || asked.way == kThrows || asked.way == kMoreRows) {
    check(completion.status != 0 && !completion.error.empty(),
          "a batch whose model fails fails, and says why");
  }
  for (aoti::Handle handle : completion.outputs) {
    check(completion.status == 0 || handle == nullptr, "a failed batch gives no outputs");
  }
  check(completion.status != 0 || completion.parts.size() == outputs * asked.rows.size(),
        "each member has its outputs");
  const std::lock_guard lock(round.mutex);
  for (std::size_t part = 0; part < completion.parts.size(); ++part) {
    aoti::OwnedHandle handle = completion.parts.exchange(part);
    check(completion.status == 0 || !handle, "a failed batch gives no parts");
    if (!handle) continue;
    const std::size_t member = part / outputs;
    const int value = asked.values[member] + (asked.way == kPassesOn ? 0 : 1);
    round.kept.push_back({std::move(handle), asked.rows[member], asked.columns[member], value});
  }
  round.succeeded += completion.status == 0;
  for (aoti::Handle tensor : asked.tensors) torch_delete_tensor(tensor);
}

void run_here(Round& round, std::mt19937& random, std::size_t slot) {
  Asked asked;
  aoti::Work work = ask(round, random, slot, asked);
  aoti::Completion completion = aoti::run_here(round.lanes->runtime(), std::move(work));
  check(inputs_left() == 0, "a run here leaves no input");
  answer(round, asked, completion);
}

void produce(Round& round, unsigned seed, std::size_t slot) {
  std::mt19937 random(seed);
  for (int made = 0; made < kBatches; ++made) {
    if (random() % 3 == 0) run_here(round, random, slot);
    const std::size_t lane = random() % round.count;
    Asked asked;
    aoti::Work work =
        ask(round, random, lane, asked);  // one work at a time of a lane, so one of its slot
    {
      const std::lock_guard lock(round.mutex);
      round.asked[work.token] = std::move(asked);
    }
    while (!round.lanes->submit(lane, work)) {
      check(work.batch != nullptr, "a batch that is refused is untouched");
      std::this_thread::yield();
    }
  }
}

void take(Round& round) {
  for (aoti::Completion& completion : round.lanes->drain(3)) {
    Asked asked;
    {
      const std::lock_guard lock(round.mutex);
      const auto found = round.asked.find(completion.token);
      check(found != round.asked.end(), "a batch comes back once");
      asked = std::move(found->second);
      round.asked.erase(found);
    }
    answer(round, asked, completion);
  }
}

bool readable(Round& round) {
  pollfd descriptor{round.lanes->descriptor(), POLLIN, 0};
  return poll(&descriptor, 1, 0) == 1;
}

int play(std::mt19937& random) {
  const int tensors = live_tensors();
  const int storages = live_storages();
  int succeeded = 0;
  {
    Round round(random);
    std::atomic<bool> over{false};
    std::thread drainer([&round, &over] {
      while (!over) {
        if (readable(round)) take(round);
        std::this_thread::yield();
      }
    });
    std::vector<std::thread> producers;
    for (std::size_t i = 0; i < kProducers; ++i) {
      producers.emplace_back(produce, std::ref(round), random(), round.count + i);
    }
    for (std::thread& producer : producers) producer.join();
    round.lanes->close();
    over = true;
    drainer.join();
    const bool drains_all = random() % 2 == 0;
    while (drains_all && readable(round)) take(round);
    check(!drains_all || round.asked.empty(), "each batch comes back, and the bell says so");
    for (const Kept& kept : round.kept) {
      check(is_matrix_of(kept.tensor.get(), kept.rows, kept.columns, kept.value),
            "a member's rows are its own, for ever");
    }
    for (auto& [token, asked] : round.asked) {
      for (aoti::Handle tensor : asked.tensors) torch_delete_tensor(tensor);
    }
    succeeded = round.succeeded;
  }
  refuse_torch_call(0);
  check(live_tensors() == tensors, "no tensor is lost");
  check(live_storages() == storages, "no memory is lost");
  return succeeded;
}

}  // namespace

int main(int argc, char** argv) {
  check(argc == 3, "arguments: seed, rounds");
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[1])));
  const int rounds = std::atoi(argv[2]);
  int succeeded = 0;
  for (int round = 0; round < rounds; ++round) succeeded += play(random);
  check(succeeded > rounds * 50, "most batches of sound models succeed");
  std::printf("%d rounds\n", rounds);
}
