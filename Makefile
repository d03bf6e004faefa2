# The work is done by the scripts in ci/ and images/; they can be called directly too.
.PHONY: help images
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

images: ## build the VM images (kernel, base, povray, server) into the cache
	@ci/install images
	@images/build
