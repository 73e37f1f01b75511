// Builds the std::unordered_map that the C ABI's older functions take, for ctypes.
#include <string>
#include <unordered_map>

using Map = std::unordered_map<std::string, void*>;

extern "C" {
Map* map_new() { return new Map; }
void map_put(Map* map, const char* name, void* handle) { map->emplace(name, handle); }
void* map_get(Map* map, const char* name) {
  auto found = map->find(name);
  return found == map->end() ? nullptr : found->second;
}
size_t map_size(Map* map) { return map->size(); }
void map_delete(Map* map) { delete map; }
}
