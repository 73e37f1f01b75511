// What stands for a tensor here.
#pragma once

namespace aoti {

using Handle = void*;  // AtenTensorHandle

}  // namespace aoti
