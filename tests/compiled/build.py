"""Compiles the few packages by which the tests of package reading learn what torch really writes.

Run as `python tests/compiled/build.py DIRECTORY`, in a process of its own: torch's compiler leaves
warnings and settings behind. Importing it registers the custom operator.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export.pt2_archive._package import package_pt2

ROWS = 4096  # enough for inductor to share a reduction among threads
WIDTH = 16  # one-dimensional constants of up to 8 elements are written into the code and vanish


@torch.library.custom_op("package_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Pooling(nn.Module):
    """Reductions over all rows, which become parallel regions with one partial result per
    thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), torch.exp(x).sum()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.package_tests.twice(x * self.weight)


def seeded(make: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def main(directory: Path) -> None:
    def compile_model(make: type[nn.Module], package: bool = True, **settings):
        example = (torch.randn(ROWS, WIDTH),)
        program = torch.export.export(seeded(make), example)
        options = {f"aot_inductor.{name}": value for name, value in settings.pop("aot", {}).items()}
        options |= {f"cpp.{name}": value for name, value in settings.items()}
        options |= {"aot_inductor.compile_wrapper_opt_level": "O0"}  # compiles faster, no more
        return torch._inductor.aot_compile(
            program.module(), example, options={"aot_inductor.package": package, **options}
        )

    no_weights = {"package_constants_in_so": False}
    package_pt2(
        str(directory / "plain.pt2"),
        aoti_files={
            "model": compile_model(
                Pooling,
                aot={"metadata": {"owner": "the tests", "threads": str(torch.get_num_threads())}},
            )
        },
    )
    package_pt2(
        str(directory / "blob.pt2"),
        aoti_files={
            "model": compile_model(
                Custom, threads=1, aot={"package_constants_on_disk_format": "binary_blob"}
            )
        },
    )
    pickled = compile_model(
        Pooling, threads=3, aot={**no_weights, "package_constants_on_disk_format": "pickle_weights"}
    )
    custom = compile_model(Custom, threads=1, aot=no_weights)
    package_pt2(str(directory / "several.pt2"), aoti_files={"pooling": pickled, "custom": custom})
    (directory / "bare").mkdir()
    compile_model(
        Custom, package=False, threads=1, aot={"output_path": str(directory / "bare" / "custom.so")}
    )
    torch.export.save(
        torch.export.export(seeded(Custom), (torch.randn(2, WIDTH),)), directory / "exported.pt2"
    )


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
