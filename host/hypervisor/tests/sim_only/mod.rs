//! What only the simulator promises: scale, faults that can be repeated, virtual time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;
use xbee_agent::protocol::{
    BootConfig, EndCause, Execute, ExitStatus, GENERATION, MountRoot, OutputStream, Secret,
    StartMode, Transport, Variable, code,
};
use xbee_agent::{Agent, Event, ExecSpec, FileMeta, Resume};
use xbee_hypervisor::sim::{SimConfig, SimEvent, SimHost, SimHypervisor};
use xbee_hypervisor::{Disk, DiskFormat, DomainSpec, Error, Hypervisor, StopReason};

const SECRET: Secret = Secret([5; 32]);

struct Host {
    dir: tempfile::TempDir,
    host: Arc<SimHost>,
    hypervisor: SimHypervisor,
}

impl Host {
    fn new(change: impl FnOnce(&mut SimConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = SimConfig::new(dir.path().to_owned());
        change(&mut config);
        let host = SimHost::new(config);
        let hypervisor = SimHypervisor::new(Arc::clone(&host));
        Self {
            dir,
            host,
            hypervisor,
        }
    }

    fn spec(&self, number: u32) -> DomainSpec {
        let id = Uuid::from_u128(u128::from(number));
        DomainSpec {
            id,
            name: format!("domain {number}"),
            owner: String::new(),
            vcpus_max: None,
            memory_max_bytes: None,
            vcpus: 1,
            memory_bytes: 64 << 20,
            kernel: Some("kernel".into()),
            initramfs: None,
            kernel_args: Vec::new(),
            disks: vec![Disk {
                image: "disk".into(),
                format: DiskFormat::Raw,
                read_only: false,
            }],
            cid: 3 + number,
            interface: None,
            boot_config: BootConfig {
                generation: GENERATION,
                domain: id,
                hostname: "guest".to_owned(),
                secret: SECRET,
                transport: Transport::Vsock { port: 22594 },
                network: None,
            }
            .encode(),
            run_dir: self.dir.path().join(id.to_string()),
        }
    }

    async fn run(&self, number: u32) -> DomainSpec {
        let spec = self.spec(number);
        self.hypervisor.create(&spec).await.unwrap();
        self.hypervisor.start(spec.id).await.unwrap();
        spec
    }

    async fn agent(&self, id: Uuid) -> (Agent, mpsc::Receiver<Event>) {
        let stream = self.hypervisor.channel(id).await.unwrap();
        Agent::connect(stream, &SECRET, Resume::default())
            .await
            .unwrap()
    }
}

fn task(argv: &[&str]) -> Execute {
    let mut task = super::support::echo(Uuid::new_v4());
    task.argv = argv.iter().map(|arg| (*arg).to_owned()).collect();
    task
}

/// Runs a task to its end: standard output and the last event.
async fn finish(
    agent: &Agent,
    events: &mut mpsc::Receiver<Event>,
    task: Execute,
) -> (String, Event) {
    assert!(!agent.execute(task).await.unwrap());
    let mut stdout = Vec::new();
    loop {
        match events.recv().await.unwrap() {
            Event::Output {
                stream: OutputStream::Stdout,
                offset,
                data,
                conversation,
            } => {
                assert_eq!(offset, stdout.len() as u64);
                stdout.extend_from_slice(&data);
                agent
                    .ack_output(conversation, OutputStream::Stdout, stdout.len() as u64)
                    .unwrap();
            }
            Event::Output { .. } => {}
            last => return (String::from_utf8(stdout).unwrap(), last),
        }
    }
}

fn status(event: &Event) -> ExitStatus {
    match event {
        Event::Exited { exited, .. } => exited.status,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_thousand_domains_run_at_once() {
    const COUNT: u32 = 1_000;
    let host = Host::new(|_| {});
    let real = Instant::now();
    let virtual_start = tokio::time::Instant::now();
    let host = &host;
    let one = |number| async move {
        let spec = host.run(number).await;
        let (agent, mut events) = host.agent(spec.id).await;
        let (_, last) = finish(&agent, &mut events, task(&["sleep", "60"])).await;
        assert_eq!(status(&last), ExitStatus::Code(0));
        agent.shutdown(Duration::from_secs(1)).await.unwrap();
        let outcome = host
            .hypervisor
            .shutdown(spec.id, Duration::from_secs(9))
            .await;
        outcome.unwrap();
        host.hypervisor.destroy(spec.id).await.unwrap();
    };
    super::join_all((0..COUNT).map(one)).await;
    assert_eq!(host.hypervisor.list().await.unwrap(), []);
    // At once, not one after another.
    let virtual_s = virtual_start.elapsed().as_secs_f64();
    assert!((60.0..62.0).contains(&virtual_s), "{virtual_s} s");
    println!(
        "{COUNT} domains, {virtual_s} virtual seconds: {:?}",
        real.elapsed()
    );
    assert!(
        real.elapsed() < Duration::from_secs(120),
        "{:?}",
        real.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn the_agent_does_what_a_real_one_does() {
    let host = Host::new(|_| {});
    let spec = host.run(1).await;
    let (agent, mut events) = host.agent(spec.id).await;
    assert_eq!(agent.domain(), spec.id);
    let root = agent.mount_root(MountRoot::default()).await.unwrap();
    assert_eq!(agent.mount_root(MountRoot::default()).await.unwrap(), root);
    assert_eq!(agent.start(StartMode::Auto).await.unwrap().init, None);

    // A file larger than the windows, there and back, with holes in it.
    let mut content = vec![7; 700_000];
    content[100_000..400_000].fill(0);
    let meta = FileMeta {
        path: "/data/in".to_owned(),
        mode: 0o640,
        ..FileMeta::default()
    };
    let put = agent.put_file(meta, content.as_slice()).await.unwrap();
    let mut back = Vec::new();
    let got = agent.get_file("data/in", &mut back, 1 << 20).await.unwrap();
    assert_eq!(
        (put.blake3, put.mode, got),
        (*blake3::hash(&content).as_bytes(), 0o640, put.clone())
    );
    assert!(back == content);

    let (stdout, last) = finish(&agent, &mut events, task(&["cat", "/data/in"])).await;
    assert_eq!(
        (stdout.len(), status(&last)),
        (content.len(), ExitStatus::Code(0))
    );
    let mut env = task(&["env"]);
    env.environment = vec![Variable {
        name: "A".to_owned(),
        value: "b c".to_owned(),
    }];
    env.stdout = Some("/data/env".to_owned());
    let (stdout, _) = finish(&agent, &mut events, env).await;
    assert!(stdout.ends_with("\nA=b c\n"), "{stdout}");
    let mut cat = task(&["cat"]);
    cat.stdin = Some("/data/env".to_owned());
    assert_eq!(finish(&agent, &mut events, cat).await.0, stdout);
    let (_, last) = finish(&agent, &mut events, task(&["sh", "-c", "exit 42"])).await;
    assert_eq!(status(&last), ExitStatus::Code(42));
    let (_, last) = finish(&agent, &mut events, task(&["frobnicate"])).await;
    assert!(
        matches!(&last, Event::Failed { failure, .. } if failure.code == code::COMMAND_NOT_FOUND),
        "{last:?}"
    );

    // Not twice; terminated; out of time.
    let sleep = task(&["sleep", "1000"]);
    let conversation = sleep.conversation;
    assert!(!agent.execute(sleep.clone()).await.unwrap());
    assert!(agent.execute(sleep).await.unwrap());
    agent
        .terminate_task(conversation, Duration::ZERO)
        .await
        .unwrap();
    let Some(Event::Exited { exited, .. }) = events.recv().await else {
        panic!()
    };
    assert_eq!(exited.cause, Some(EndCause::Terminated));
    let mut limited = task(&["sleep", "1000"]);
    limited.limits.wall_clock_ms = Some(5_000);
    let (_, last) = finish(&agent, &mut events, limited).await;
    let Event::Exited { exited, .. } = last else {
        panic!()
    };
    assert_eq!(
        (exited.cause, exited.wall_clock_ms),
        (Some(EndCause::WallClockLimit), 5_000)
    );

    // Beside the task.
    let argv = vec!["echo".to_owned(), "beside".to_owned()];
    let mut beside = agent
        .exec(ExecSpec {
            argv,
            ..ExecSpec::default()
        })
        .await
        .unwrap();
    let mut stdout = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut beside.stdout.take().unwrap(), &mut stdout)
        .await
        .unwrap();
    assert_eq!(
        (stdout.as_str(), beside.wait().await.unwrap()),
        ("beside\n", ExitStatus::Code(0))
    );
    let error = agent.forward(80).await.err().unwrap();
    assert_eq!(error.code(), code::CONNECTION_REFUSED);

    agent.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(
        super::end(&host.hypervisor, spec.id).await,
        StopReason::GuestShutdown
    );
}

#[tokio::test(start_paused = true)]
async fn a_wrong_secret_is_refused() {
    let host = Host::new(|_| {});
    let spec = host.run(1).await;
    let stream = host.hypervisor.channel(spec.id).await.unwrap();
    let error = Agent::connect(stream, &Secret([6; 32]), Resume::default())
        .await
        .unwrap_err();
    assert!(
        matches!(error, xbee_agent::Error::Authentication),
        "{error}"
    );
    // It dials again, and the right one is welcome.
    host.agent(spec.id).await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_comes_back_and_a_silent_agent_is_noticed() {
    let host = Host::new(|_| {});
    let spec = host.run(1).await;
    let (agent, mut events) = host.agent(spec.id).await;
    let sleep = task(&["sleep", "20"]);
    agent.execute(sleep.clone()).await.unwrap();
    host.host.inject(spec.id, SimEvent::DropConnection).unwrap();
    assert!(matches!(events.recv().await, Some(Event::Lost(_))));
    let (agent, mut events) = host.agent(spec.id).await;
    assert!(
        agent.execute(sleep).await.unwrap(),
        "the task was started again"
    );
    let event = events.recv().await.unwrap();
    assert_eq!(status(&event), ExitStatus::Code(0));

    host.host.inject(spec.id, SimEvent::SilenceAgent).unwrap();
    let lost = events.recv().await.unwrap();
    assert!(format!("{lost:?}").contains("Silent"), "{lost:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_agent_never_comes() {
    let host = Host::new(|config| config.lost_agent = 1.0);
    let spec = host.run(1).await;
    let hour = Duration::from_secs(3_600);
    assert!(
        timeout(hour, host.hypervisor.channel(spec.id))
            .await
            .is_err()
    );
}

#[tokio::test(start_paused = true)]
async fn faults_are_the_same_for_the_same_seed() {
    let outcomes = |seed| async move {
        let host = Host::new(|config| {
            config.seed = seed;
            config.refused_create = 0.2;
            config.refused_start = 0.2;
            config.crash = 0.5;
            config.boot_ms = 10..=2_000;
        });
        let mut outcomes = Vec::new();
        for number in 0..60 {
            let spec = host.spec(number);
            let mut outcome = String::new();
            if let Err(error) = host.hypervisor.create(&spec).await {
                outcome += error.code();
                // Trying again may help.
                while host.hypervisor.create(&spec).await.is_err() {}
            }
            outcome += match host.hypervisor.start(spec.id).await {
                Err(error) => error.code(),
                Ok(()) => match timeout(Duration::from_secs(60), host.hypervisor.channel(spec.id))
                    .await
                    .unwrap()
                {
                    Ok(_) => "connected",
                    Err(Error::Gone {
                        reason: StopReason::Failed { .. },
                        ..
                    }) => "crashed",
                    Err(error) => panic!("{error}"),
                },
            };
            outcomes.push(outcome);
        }
        outcomes
    };
    let first = outcomes(1).await;
    assert_eq!(first, outcomes(1).await);
    assert_ne!(first, outcomes(2).await);
    for wanted in ["hypervisor-broken", "start-failed", "crashed", "connected"] {
        assert!(
            first.iter().any(|outcome| outcome.contains(wanted)),
            "no {wanted}: {first:?}"
        );
    }
}
