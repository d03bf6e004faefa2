//! A guest whose kernel has no vchan: its agent is reached over the bridge.

use tokio::time::timeout;
use xbee_agent::protocol::{BootConfig, Network};
use xbee_agent::{Agent, Resume};
use xbee_hypervisor::{DomainSpec, Interface};

use crate::support::{Fixture, Guest, LIMIT, SECRET};

/// A guest with the driver of its network card, and nothing that grants memory.
fn spec(fixture: &Fixture, number: u8) -> DomainSpec {
    let mut spec = fixture.spec(Guest::Agent);
    let kernel = spec.kernel.as_ref().unwrap().parent().unwrap();
    let version = std::fs::read_to_string(kernel.join("version")).unwrap();
    let mut archive = std::fs::read(spec.initramfs.as_ref().unwrap()).unwrap();
    archive.resize(archive.len().next_multiple_of(4), 0);
    let mut writer = xbee_initramfs::Writer::new(archive);
    let module = format!(
        "/lib/modules/{}/kernel/drivers/net/xen-netfront.ko\n",
        version.trim()
    );
    writer
        .file("xbee/modules", 0o644, module.as_bytes())
        .unwrap();
    let path = fixture.path(&format!("{number}.cpio"));
    std::fs::write(&path, writer.finish().unwrap()).unwrap();
    spec.initramfs = Some(path);
    let (mac, address) = (
        [0x02, 0xbe, 0, 0, 1, number],
        format!("fd58:454e::1:{number}").parse().unwrap(),
    );
    let mut config = BootConfig::decode(&spec.boot_config).unwrap();
    config.network = Some(Network {
        mac,
        address,
        prefix_length: 64,
        gateway: None,
    });
    spec.boot_config = config.encode();
    spec.interface = Some(Interface {
        mac,
        address,
        peers: false,
    });
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn without_channels_the_agent_is_reached_by_tcp() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let spec = spec(&fixture, 1);
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    // Each time anew.
    for _ in 0..3 {
        let stream = timeout(LIMIT, hypervisor.channel(spec.id)).await;
        let stream = stream.expect("no agent").unwrap();
        let (agent, _events) = Agent::connect(stream, &SECRET, Resume::default())
            .await
            .unwrap();
        assert_eq!(agent.domain(), spec.id);
    }
    hypervisor.destroy(spec.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_channels_and_network_it_is_said_what_is_missing() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let mut spec = spec(&fixture, 2);
    spec.interface = None;
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    let error = timeout(LIMIT, hypervisor.channel(spec.id)).await;
    let error = error.expect("no answer").err().unwrap();
    assert_eq!(error.code(), "hypervisor-control");
    let causes = format!("{:?}", error);
    assert!(causes.contains("no vchan"), "{causes}");
    hypervisor.destroy(spec.id).await.unwrap();
}
