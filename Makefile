# make demo    PoolFormer on real photos: verified against timm and timed; writes report/index.html
# make test    the test suite        make lint   ruff, clang-format, floors    make bench  benchmarks and plots
# make test-long   the rest of it: full products of parameters, all of gpu-check on a null GPU
# make sanitize   the operators' tests under AddressSanitizer and UBSan
# make mutants   whether the operators' tests find mistakes in the kernels (ten minutes)
# make train-demo   a small PoolFormer learns handwritten digits: train-demo/index.html
# make dense-demo   a detector and a segmenter learn to find cell nuclei: dense-demo/*/index.html (4 minutes)
# make docs    the pages of docs/ as a site: open site/index.html
# make setup   environment and extension only                              make clean  remove all of it
# make gpu-check   build for this GPU, benchmarks, CUDA tests, compute-sanitizer and a summary in OUT, with a PYTHON
#              that has torch and a GPU (9 minutes; no network, no git: COMMIT=name; DRY=1: on the null GPU)
#
# Everything lives in .venv; no system Python is touched. TORCH chooses the build, for example
# `make test TORCH=torch==2.13.0`. POOLFORMER_KERNELS_SKIP_CUDA=1, TORCH_CUDA_ARCH_LIST and MAX_JOBS reach the build.

PYTHON ?= python3
TORCH ?= torch>=2.10
VENV ?= .venv
SANITIZED := POOLFORMER_KERNELS_CXXFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
LINT := ruff==0.17.6 clang-format==23.1.5 import-linter==2.17
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH_STAMP := $(VENV)/.torch-$(subst =,_,$(subst >,_,$(subst <,_,$(subst $() ,_,$(TORCH)))))
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py pyproject.toml $(CPP)

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup demo train-demo dense-demo test test-long mutants docs lint bench sanitize gpu-check clean
.DELETE_ON_ERROR:

setup: $(VENV)/.extension

demo: $(VENV)/.extra-demo $(VENV)/.extension
	$(BIN)/poolformer-kernels demo $(ARGS)

# a run from the start; exit code 1 below 97.5 % of the validation images
train-demo: $(VENV)/.extra-train $(VENV)/.extension
	rm -rf train-demo
	$(BIN)/poolformer-kernels train sample:digits --out train-demo $(ARGS)
	$(BIN)/poolformer-kernels validate sample:digits --checkpoint train-demo/best.safetensors --at-least 97.5

# a segmenter from random weights, then a detector from its backbone, on three quarters of an image; exit code 1 below AP50 50 % or mIoU 80 % on the fourth
dense-demo: $(VENV)/.extra-train $(VENV)/.extra-dense $(VENV)/.nuclei $(VENV)/.extension
	rm -rf dense-demo && mkdir dense-demo
	$(BIN)/poolformer-kernels train sample:nuclei --task segmentation --out dense-demo/segmentation $(ARGS)
	$(BIN)/poolformer-kernels train sample:nuclei --task detection --out dense-demo/detection \
	  --checkpoint dense-demo/segmentation/best.safetensors $(ARGS)
	$(BIN)/poolformer-kernels validate sample:nuclei --checkpoint dense-demo/segmentation/best.safetensors --at-least 80
	$(BIN)/poolformer-kernels validate sample:nuclei --checkpoint dense-demo/detection/best.safetensors --at-least 50

test: $(VENV)/.extra-test $(VENV)/.nuclei $(VENV)/.extension
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" $(ARGS)

test-long: $(VENV)/.extra-test $(VENV)/.nuclei $(VENV)/.extension
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long $(ARGS)

# one mistake at a time; exit code 1 where the tests pass with it
mutants: $(VENV)/.extra-test $(VENV)/.extension
	PYTHONPATH=tests $(BIN)/python -m mutants.run $(ARGS)

# a warning fails, as for a link that leads nowhere; the variable silences an advertisement
docs: $(VENV)/.extra-docs $(VENV)/.extension
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.extra-bench $(VENV)/.extension
	for name in pool-mixer mlp block model training; do $(BIN)/poolformer-kernels bench $$name $(ARGS) || exit; done
	$(BIN)/python -m benchmarks.plots

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CPP) tests/*.cpp tests/cuda_executor/*.cpp tests/cuda_executor/*/*.cpp \
	  tests/cuda_executor/include/*.h \
	  tests/null_gpu/csrc/*/*.cpp tests/null_gpu/csrc/*/*.h

sanitize: $(VENV)/.extra-test $(VENV)/.extension
	POOLFORMER_KERNELS_SKIP_CUDA=1 $(SANITIZED) \
	  $(BIN)/python setup.py --quiet build --build-base build/sanitize-temp --build-lib build/sanitize
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. $(SANITIZED) $(abspath $(BIN))/python -m pytest -n 2 --dist worksteal ../../tests/contract/pool_mixer.py ../../tests/contract/mlp*.py ../../tests/contract/both*.py \
	  ../../tests/test_operators.py ../../tests/test_mlp*.py ../../tests/test_chain*.py ../../tests/test_amx.py ../../tests/test_nn*.py -m "not large and not long" \
	  -k "not compile and not export" $(ARGS)

gpu-check:
	@$(PYTHON) tests/gpu/check.py $(if $(OUT),--out "$(OUT)") $(if $(COMMIT),--commit "$(COMMIT)") $(if $(DRY),--dry)

clean:
	rm -rf $(VENV) build dist site report results train-demo dense-demo *.egg-info .pytest_cache .ruff_cache poolformer_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first, alone, and is pinned for everything after it: nothing may replace the build that was asked for.
$(TORCH_STAMP): $(VENV)/.created
	rm -f $(VENV)/.torch-* $(VENV)/.extension $(VENV)/.extra-*
	$(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" wheel ninja
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > $(VENV)/constraints.txt
	touch $@

$(VENV)/.extension: $(TORCH_STAMP) $(SOURCES)
	$(PIP) --no-build-isolation --constraint $(VENV)/constraints.txt --editable .
	touch $@

$(VENV)/.extra-%: $(TORCH_STAMP) pyproject.toml | $(VENV)/.extension
	$(PIP) --constraint $(VENV)/constraints.txt "poolformer_kernels[$*]"
	touch $@

# a real image with labelled nuclei, which this package carries; nothing of it is imported
$(VENV)/.nuclei: $(TORCH_STAMP)
	$(PIP) --no-deps stardist
	touch $@

$(VENV)/.lint: $(VENV)/.created Makefile
	$(PIP) $(LINT)
	touch $@
