//! The network between domains on QEMU, as the configuration has it.
#![allow(clippy::unwrap_used)]

use xbee_tests::{Xbed, images};

#[test]
fn domains_reach_each_other_where_the_configuration_says_so() {
    if !images().join("base/image.toml").exists() {
        println!("skipped: the image base is missing: run `make images`");
        return;
    }
    for (same_owner, reached) in [("connected", true), ("isolated", false)] {
        let xbed = Xbed::start(
            "qemu",
            &[
                "[qemu]",
                "prefix = \"fd58:454e::/64\"",
                &format!("same-owner = \"{same_owner}\""),
            ],
        );
        let job = ["run", "--print-jsdl", "--", "/bin/sleep", "1000"];
        let job = xbed.xbe(job).ok().stdout;
        let [one, two] = [(); 2].map(|()| xbed.submit(&job));
        let sh = |task: &str, script: &str| xbed.xbe(["exec", task, "--", "/bin/sh", "-c", script]);
        for task in [&one, &two] {
            xbed.wait_for(task, "Executing");
        }
        let address = "ip -6 -o addr show dev eth0 | sed -n 's|.* inet6 \\(fd58[^/]*\\)/.*|\\1|p' | head -n 1";
        let addresses = [&one, &two].map(|task| sh(task, address).line());
        assert_ne!(addresses[0], addresses[1]);
        let ping = sh(&one, &format!("ping6 -c 2 -W 2 {}", addresses[1]));
        assert_eq!(ping.code == 0, reached, "{same_owner}: {ping:?}");
        for task in [&one, &two] {
            xbed.xbe(["terminate", task]).ok();
        }
    }
}
