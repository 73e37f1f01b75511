// The lanes alone, under a sanitizer: rounds of producers, which run some works themselves,
// drainers, ringers and closers over the C model library.
//
// Which runs fail, and how, and when the lanes are closed is drawn from a seed; the arguments are
// the seed and the number of rounds. Returns 0 when nothing was lost: each accepted work came back
// once or was freed with the lanes, and no tensor is left.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <poll.h>

#include "lane.hpp"
#include "model_library.h"
#include "scripted.hpp"

namespace {

using scripted::runtime;

constexpr int kProducers = 3;
constexpr int kWorks = 150;  // of each producer, in each round

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  // A usual exit looks for leaks, and then hangs where another thread is reporting an error.
  std::_Exit(1);
}

struct Scripted {
  container script{};
  std::shared_ptr<aoti::Model> model = std::make_shared<aoti::Model>();
};

// One way to end each: success of several shapes, a status, both kinds of exceptions.
std::vector<std::unique_ptr<Scripted>> make_models(std::mt19937& random) {
  std::vector<std::unique_ptr<Scripted>> models;
  for (int way = 0; way < 8; ++way) {
    auto made = std::make_unique<Scripted>();
    container& script = made->script;
    script.stolen = random() % 8;
    script.made = random() % 4;
    script.again = random() % 2 == 0 ? 2 : 0;
    script.made &= ~script.again;
    script.error = "scripted";
    script.cause = "by the stress";
    if (way == 5) script.status = 1;
    if (way == 6) script.throws = THROWS_STANDARD;
    if (way == 7) script.throws = THROWS_OTHER;
    made->model->run = reinterpret_cast<aoti::RunFunction>(&model_run);
    made->model->container = &script;
    made->model->num_inputs = random() % 4;
    made->model->num_outputs = 2;
    made->model->last_error = &model_last_error;
    models.push_back(std::move(made));
  }
  return models;
}

// A device whose only step is its fence: torch's functions find the host's memory.
std::shared_ptr<const aoti::Device> device() {
  auto made = std::make_shared<aoti::Device>();
  made->shim.delete_tensor = &torch_delete_tensor;
  made->new_handle = &torch_another_handle;
  made->get_device_type = &torch_get_device_type;
  return made;
}

std::shared_ptr<aoti::Stream> stream(fence* waits) {
  const aoti::Fence how{reinterpret_cast<aoti::FenceFunction>(&device_fence), nullptr, waits};
  return std::make_shared<aoti::Stream>(device(), nullptr, how, std::vector<bool>(), false);
}

struct Round {
  explicit Round(std::mt19937& random)
      : models(make_models(random)),
        count(1 + random() % 3),
        closes_early(random() % 2 == 0),
        drains_all(random() % 2 == 0),
        lanes(runtime(), std::vector<std::string>(count, "aoti:stress"), {},
              static_cast<int>(random() % 5)) {}

  std::vector<std::unique_ptr<Scripted>> models;
  fence sound_fence{};
  fence broken_fence{3, 0, 0};
  std::shared_ptr<aoti::Stream> sound = stream(&sound_fence);
  std::shared_ptr<aoti::Stream> broken = stream(&broken_fence);
  std::size_t count;
  bool closes_early;
  bool drains_all;
  std::atomic<std::uint64_t> tokens{0};
  std::atomic<int> accepted{0};
  std::atomic<int> seen{0};
  std::atomic<bool> closed{false};
  std::mutex last_mutex;
  std::map<std::uint64_t, int> last;  // tokens that came back
  aoti::Lanes lanes;  // the last to be made, the first to go: its threads use the rest
};

// One of the models on this thread, as the loop runs short ones, while the lanes run others.
void run_here(const Round& round, const Scripted& scripted, int threads) {
  const int omp = omp_threads();
  const int mkl = mkl_threads();
  aoti::Work work;
  work.inputs = aoti::OwnedHandles(&torch_delete_tensor);
  work.model = scripted.model;
  work.threads = threads;
  for (std::size_t i = 0; i < scripted.model->num_inputs; ++i) {
    work.inputs.push_back(aoti::OwnedHandle(&torch_delete_tensor, new_tensor()));
  }
  const aoti::Completion completion = aoti::run_here(round.lanes.runtime(), std::move(work));
  check(omp_threads() == omp && mkl_threads() == mkl,
        "a thread has its own counts again after a run here");
  check(inputs_left() == 0, "a run here leaves no input");
  for (aoti::Handle handle : completion.outputs) {
    check(completion.status == 0 || handle == nullptr, "a failed run gives no outputs");
  }
}

void produce(Round& round, unsigned seed) {
  std::mt19937 random(seed);
  torch_set_omp_threads(1 + static_cast<int>(random() % 3));
  torch_set_mkl_threads(static_cast<int>(random() % 3));
  for (int made = 0; made < kWorks;) {
    const Scripted& scripted = *round.models[random() % round.models.size()];
    if (random() % 4 == 0) run_here(round, scripted, 1 + static_cast<int>(random() % 3));
    aoti::Work work;
    work.inputs = aoti::OwnedHandles(&torch_delete_tensor);
    work.token = ++round.tokens;
    work.model = scripted.model;
    work.threads = 1 + static_cast<int>(random() % 2);
    for (std::size_t i = 0; i < scripted.model->num_inputs; ++i) {
      work.inputs.push_back(aoti::OwnedHandle(&torch_delete_tensor, new_tensor()));
    }
    work.kept = aoti::OwnedHandles(&torch_delete_tensor);
    for (const aoti::Handle input : work.inputs) {
      aoti::OwnedHandle another(&torch_delete_tensor);
      torch_another_handle(input, another.receive());
      work.kept.push_back(std::move(another));
    }
    if (random() % 4 == 0) work.on = random() % 2 == 0 ? round.sound : round.broken;
    if (round.lanes.submit(random() % round.count, work)) {
      ++round.accepted;
      ++made;
      continue;
    }
    check(work.inputs.size() == scripted.model->num_inputs,
          "a work that is refused keeps its inputs");
    for (aoti::Handle handle : work.inputs)
      check(handle != nullptr, "a work that is refused keeps its handles");
    if (round.closed) return;
    std::this_thread::yield();
  }
}

void take(Round& round, std::size_t limit) {
  std::list<aoti::Completion> completions = round.lanes.drain(limit);
  check(completions.size() <= limit, "a drain is bounded");
  for (aoti::Completion& completion : completions) {
    check(completion.started <= completion.finished, "stamps are in order");
    for (aoti::Handle handle : completion.inputs)
      check(handle != nullptr, "what was kept of the inputs comes back");
    for (aoti::Handle handle : completion.outputs) {
      check(completion.status == 0 || handle == nullptr, "a failed run gives no outputs");
    }
    const std::lock_guard lock(round.last_mutex);
    check(++round.last[completion.token] == 1, "a work comes back once");
  }
  round.seen += static_cast<int>(completions.size());
}

bool readable(Round& round) {
  pollfd descriptor{round.lanes.descriptor(), POLLIN, 0};
  return poll(&descriptor, 1, 0) == 1;
}

void play(std::mt19937& random) {
  const int before = live_tensors();
  {
    Round round(random);
    std::atomic<bool> over{false};
    std::thread drainer([&round, &over, looks = std::mt19937(random())]() mutable {
      while (!over) {
        if (readable(round) || round.lanes.poll(std::chrono::microseconds(looks() % 40)))
          take(round, 3);
        std::this_thread::yield();
      }
    });
    std::thread ringer([&round] {
      for (int i = 0; i < 100; ++i) round.lanes.wake();
    });
    std::vector<std::thread> producers;
    for (int i = 0; i < kProducers; ++i) producers.emplace_back(produce, std::ref(round), random());
    if (round.closes_early) {
      while (round.seen < kWorks) std::this_thread::yield();
      std::thread other([&round] { round.lanes.close(); });
      round.lanes.close();
      round.closed = true;
      other.join();
    }
    for (std::thread& producer : producers) producer.join();
    ringer.join();
    round.lanes.close();
    over = true;
    drainer.join();
    check(round.closes_early || round.accepted == kProducers * kWorks,
          "open lanes take every work in the end");
    if (round.drains_all) {
      while (readable(round)) take(round, 7);
      check(round.seen == round.accepted, "each accepted work comes back, and the bell says so");
    }
  }
  check(live_tensors() == before, "no tensor is lost");
}

}  // namespace

int main(int argc, char** argv) {
  check(argc == 3, "arguments: seed, rounds");
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[1])));
  const int rounds = std::atoi(argv[2]);
  for (int round = 0; round < rounds; ++round) play(random);
  std::printf("%d rounds\n", rounds);
}
