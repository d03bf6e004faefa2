# The work is done by the scripts in ci/ and images/, which can be called directly too.
.PHONY: help images kernel run test xen-test soak fuzz lint bench bench-staging bench-mq bench-kecho kecho-figures xen-bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 15

images: ## build the VM images (kernel, base, povray, server) into the cache
	@ci/install run images
	@images/build

kernel: ## build the tuned kernel; `XBEE_KERNEL=tuned make images` uses it
	@ci/install run kernel
	@images/tuned-kernel/make

run: ## run the hello-world job in a virtual machine
	@ci/run-hello

test: ## images, lint, and all tests, on real virtual machines and on Xen
	@ci/test

xen-test: ## tests on a real Xen, which runs in QEMU
	@ci/xen/test

fuzz: ## fuzz for SECONDS (60) each what reads strangers' bytes
	@ci/install fuzz
	@ci/fuzz $(or $(SECONDS),60)

soak: ## the longer tests: 100,000 simulated tasks, 500 virtual machines, kills at each point, full disks, stress, vsock, Xen
	@ci/soak

lint: ## formatting, clippy, licences, spelling
	@ci/install test
	@ci/lint

bench: ## measure, into bench/results.md
	@ci/install run
	@images/build base
	@cargo build --release --workspace --bins
	@ci/results main cargo run --release -p xbee-tests --bin bench

bench-staging: ## stage-in of a packed image against lbzip2, pigz and zstd; into bench/results.md
	@ci/install bench
	@ci/results Staging cargo run --release -p xbee-staging --example bench-staging all

bench-mq: ## the message broker against RabbitMQ and ActiveMQ, and what sealing costs; into bench/results.md
	@ci/install mq
	@ci/results 'Message queue' cargo run --release -p xbee-mq --example bench-mq all
	@ci/results 'Sealed messages' cargo run --release -p xbee-carry --example bench-sealed all

kecho-figures: ## simulate the load balancer; tables and plots into docs/
	@cargo run --release -p xbee-kecho --example balance-sim docs

bench-kecho: ## event channels against NATS, Redis, Mosquitto, ZeroMQ, zenoh and iceoryx2; into bench/results.md and docs
	@ci/install kecho
	@cargo build --release --locked --manifest-path bench/kecho/Cargo.toml
	@ci/results 'Event channels' bench/kecho/target/release/bench-kecho all $(or $(ROUNDS),5) docs

xen-bench: ## the experiments on a real Xen, which runs in QEMU; into bench/results.md
	@ci/results Xen ci/xen/bench

clean: ## remove what cargo built; the images' cache stays
	@cargo clean
