# make build | demo | test | bench | check | man | evidence | tools | fuzz | clean
#
# `make test` is the one test command: on a Debian machine with Go, as root, it
# installs what it needs and runs everything that must hold for a commit.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

# A clone may belong to another user than the one who builds it.
VERSION := $(shell git -c safe.directory='*' describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
BUILD   := CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags '$(LDFLAGS)'

.PHONY: build build-arm64 demo test check bench evidence fuzz man tools clean

# build_for ARCH,FILE builds the initrd's init, then instar with it inside.
INITBIN := cmd/instar/internal/initbin/bin
define build_for
GOARCH=$(1) $(BUILD) -o $(INITBIN)/instar-init-$(1) ./cmd/instar-init
gzip -9nf $(INITBIN)/instar-init-$(1)
GOARCH=$(1) $(BUILD) -o $(2) ./cmd/instar
endef

build:                 ## ./instar, static, the initrd's init inside, for this machine
	$(call build_for,$(shell go env GOARCH),instar)

build-arm64:           ## ./instar-arm64
	$(call build_for,arm64,instar-arm64)

demo: build            ## capture this machine's root and bring it back (DEMO_ARGS=…)
	test/demo $(DEMO_ARGS)

test:                  ## everything a commit must pass
	test/run

check:                 ## format, vet, staticcheck, go.mod, dependency rules, both builds
	test/run check

bench:                 ## figures against the peers, with targets (BENCH_ARGS=…)
	test/tools debian bench
	go run -buildvcs=false ./test/bench $(BENCH_ARGS)
	go run -buildvcs=false ./test/bench/metadata
	go run -buildvcs=false ./test/bench/boot
	go run -buildvcs=false ./test/bench/lazy
	go run -buildvcs=false ./test/bench/agent
	test/tools go minio
	go run -buildvcs=false ./test/bench/catalog

evidence:              ## the long campaigns, with counts
	test/run evidence

fuzz:                  ## every fuzz target for FUZZTIME (default 30s)
	test/run fuzz

man: build             ## manual pages and shell completion into ./man
	./instar man man

tools:                 ## Debian packages, Go tools and servers the tests use
	test/tools debian test
	test/tools go staticcheck gofumpt minio versitygw

clean:
	rm -rf instar instar-arm64 $(INITBIN)/*.gz man demo-out
