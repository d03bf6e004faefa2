//! The processes that publish and subscribe. Each does what the lines of its standard input say, and answers in lines on
//! its standard output; it ends with its input.

use std::io::{BufRead as _, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use crate::event::{END, HEAD_BYTES, HELLO, head, mark};
use crate::numbers::quantile;
use crate::system::{Place, Publisher, Result, Subscriber, System};

/// Between two events to subscribers that may not be there yet.
const HELLO_EVERY: Duration = Duration::from_millis(10);
/// How long nothing must arrive until nothing is on its way.
const QUIET: Duration = Duration::from_millis(50);
/// Round trips before those that count.
const WARM_UP: u64 = 500;
/// Round trips that count, at most.
const TRIPS: u64 = 20_000;
/// How long round trips are measured, at most.
const TRIPS_FOR: Duration = Duration::from_millis(400);
/// Events in a burst whose submission is timed.
const BURST: u64 = 100;
/// Bursts that count, at most.
const BURSTS: usize = 200;
/// How long bursts are timed, at most; `LEAST_BURSTS` are timed however long they take.
const BURSTS_FOR: Duration = Duration::from_secs(1);
const LEAST_BURSTS: usize = 20;
/// Bursts before those that count.
const BURSTS_BEFORE: usize = 5;
/// How long a flood of events should last, at least.
const FLOOD_FOR: Duration = Duration::from_millis(500);
/// Events of a flood, at most.
const FLOOD: u64 = 2_000_000;
/// Answers to the publisher's window, in events.
const ANSWER_EVERY: u64 = 1024;
/// Bytes of an event of a burst or a flood.
const EVENT_BYTES: usize = 100;

/// Standard input and output.
struct Orders(Receiver<String>);

impl Orders {
    fn new() -> Orders {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines() {
                let Ok(line) = line else { break };
                if sender.send(line).is_err() {
                    return;
                }
            }
            // Whoever gave the orders is gone; a subscriber may wait for ever.
            std::process::exit(1);
        });
        Orders(receiver)
    }

    fn next(&self) -> Result<String> {
        Ok(self.0.recv()?)
    }
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

/// Runs a role to its end; what goes wrong is said.
pub fn run(role: &str, system: &dyn System, arguments: &[&str]) -> Result<()> {
    let orders = Orders::new();
    let done = match (role, arguments) {
        ("ping", [ping, pong]) => ping_role(system, &ping.parse()?, &pong.parse()?, &orders),
        ("pong", [ping, pong]) => pong_role(system, &ping.parse()?, &pong.parse()?, &orders),
        ("both", [ping, pong]) => both_role(system, &ping.parse()?, &pong.parse()?, &orders),
        ("publish", [place, count]) => publish(system, &place.parse()?, count.parse()?, &orders),
        ("subscribe", [place, index]) => subscribe(system, &place.parse()?, index),
        _ => Err(format!("no role {role} with {arguments:?}").into()),
    };
    match &done {
        Ok(()) => say("ended"),
        Err(error) => say(&format!("error {}", text_of(error.as_ref()))),
    }
    done
}

/// An error and its causes, in one line.
pub fn text_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text.replace('\n', " ")
}

fn ping_role(system: &dyn System, ping: &Place, pong: &Place, orders: &Orders) -> Result<()> {
    let mut publisher = system.publisher(ping, 1)?;
    say("published");
    orders.next()?;
    let mut subscriber = system.subscriber(pong)?;
    say("subscribed");
    serve_trips(publisher.as_mut(), subscriber.as_mut(), orders)
}

fn pong_role(system: &dyn System, ping: &Place, pong: &Place, orders: &Orders) -> Result<()> {
    let mut publisher = system.publisher(pong, 1)?;
    say("published");
    orders.next()?;
    let mut subscriber = system.subscriber(ping)?;
    say("subscribed");
    echo(publisher.as_mut(), subscriber.as_mut())
}

/// Both in one process, each in a thread.
fn both_role(system: &dyn System, ping: &Place, pong: &Place, orders: &Orders) -> Result<()> {
    let both = Arc::new(Barrier::new(2));
    std::thread::scope(|scope| {
        let there = both.clone();
        scope.spawn(move || {
            let done = (|| {
                let mut publisher = system.publisher(pong, 1)?;
                there.wait();
                let mut subscriber = system.subscriber(ping)?;
                there.wait();
                echo(publisher.as_mut(), subscriber.as_mut())
            })();
            if let Err(error) = done {
                say(&format!("error {}", text_of(error.as_ref())));
                std::process::exit(1);
            }
        });
        let mut publisher = system.publisher(ping, 1)?;
        both.wait();
        let mut subscriber = system.subscriber(pong)?;
        both.wait();
        say("subscribed");
        serve_trips(publisher.as_mut(), subscriber.as_mut(), orders)
    })
}

/// Sends back what comes, until it is told to end.
fn echo(publisher: &mut dyn Publisher, subscriber: &mut dyn Subscriber) -> Result<()> {
    let mut ended = false;
    while !ended {
        subscriber.receive(None, &mut |event| {
            ended |= head(event)?.0 == END;
            publisher.send(event)
        })?;
    }
    Ok(())
}

/// Waits for the answer of the other; `trips BYTES` measures.
fn serve_trips(
    publisher: &mut dyn Publisher,
    subscriber: &mut dyn Subscriber,
    orders: &Orders,
) -> Result<()> {
    let mut hello = vec![0; EVENT_BYTES];
    mark(&mut hello, HELLO, false);
    publisher.send(&hello)?;
    while subscriber.receive(Some(HELLO_EVERY), &mut |_| Ok(()))? == 0 {
        publisher.send(&hello)?;
    }
    while subscriber.receive(Some(QUIET), &mut |_| Ok(()))? > 0 {}
    say("met");
    loop {
        let order = orders.next()?;
        match order.split_once(' ') {
            Some(("trips", bytes)) => say(&trips(publisher, subscriber, bytes.parse()?)?),
            _ => {
                mark(&mut hello, END, false);
                publisher.send(&hello)?;
                // It answers to this one too; then nobody is cut off.
                subscriber.receive(Some(QUIET), &mut |_| Ok(()))?;
                return Ok(());
            }
        }
    }
}

/// `result P50 P99` of one way, in nanoseconds.
fn trips(
    publisher: &mut dyn Publisher,
    subscriber: &mut dyn Subscriber,
    bytes: usize,
) -> Result<String> {
    let mut event = vec![0; bytes];
    let mut times = Vec::with_capacity(TRIPS as usize);
    let mut started = Instant::now();
    let mut number = 0;
    while number < WARM_UP || (number < WARM_UP + TRIPS && started.elapsed() < TRIPS_FOR) {
        if number == WARM_UP {
            started = Instant::now();
        }
        mark(&mut event, number, false);
        let begin = Instant::now();
        publisher.send(&event)?;
        let mut answered = false;
        while !answered {
            subscriber.receive(None, &mut |event| {
                answered |= head(event)?.0 == number;
                Ok(())
            })?;
        }
        let time = begin.elapsed();
        if number >= WARM_UP {
            times.push(time.as_nanos() as f64 / 2.0);
        }
        number += 1;
    }
    times.sort_by(f64::total_cmp);
    let (p50, p99) = (quantile(&times, 0.5), quantile(&times, 0.99));
    Ok(format!("result {p50:.0} {p99:.0}"))
}

/// What subscribers tell their publisher, beside what is measured: how far they are.
struct Answers {
    streams: Vec<UnixStream>,
    reached: Vec<u64>,
}

impl Answers {
    /// Events sent with a number below `count` have reached every subscriber.
    fn wait(&mut self, count: u64) -> Result<()> {
        for (stream, reached) in self.streams.iter_mut().zip(&mut self.reached) {
            while *reached < count {
                let mut number = [0; 8];
                stream.read_exact(&mut number)?;
                *reached = u64::from_le_bytes(number) + 1;
            }
        }
        Ok(())
    }
}

/// `meet` waits for all subscribers, `submit` times the call, `flood` measures the rate.
fn publish(system: &dyn System, place: &Place, subscribers: usize, orders: &Orders) -> Result<()> {
    let listener = UnixListener::bind(place.file("answers"))?;
    let mut publisher = system.publisher(place, subscribers)?;
    say("published");
    let mut answers = Answers {
        streams: Vec::new(),
        reached: vec![0; subscribers],
    };
    let mut number = 0;
    let mut event = vec![0; EVENT_BYTES];
    loop {
        let order = orders.next()?;
        match order.split_once(' ').unwrap_or((&order, "")) {
            ("meet", _) => {
                for _ in 0..subscribers {
                    answers.streams.push(listener.accept()?.0);
                }
                meet(publisher.as_mut(), &answers.streams)?;
                say("met");
            }
            ("submit", _) => {
                let mut times = Vec::new();
                let started = Instant::now();
                let enough = BURSTS_BEFORE + BURSTS;
                while times.len() < BURSTS_BEFORE + LEAST_BURSTS
                    || (times.len() < enough && started.elapsed() < BURSTS_FOR)
                {
                    let begin = Instant::now();
                    for n in 1..=BURST {
                        mark(&mut event, number, n == BURST);
                        number += 1;
                        publisher.send(&event)?;
                    }
                    times.push(begin.elapsed().as_nanos() as f64 / BURST as f64);
                    publisher.flush()?;
                    answers.wait(number)?;
                }
                times.drain(..BURSTS_BEFORE);
                times.sort_by(f64::total_cmp);
                let (p50, p99) = (quantile(&times, 0.5), quantile(&times, 0.99));
                say(&format!("result {p50:.1} {p99:.1}"));
            }
            ("flood", _) => {
                // More and more, until it takes long enough to be measured.
                let mut count = 1000;
                loop {
                    let window = system.window();
                    let time = flood(publisher.as_mut(), &mut answers, window, number, count)?;
                    number += count;
                    if time >= FLOOD_FOR || count == FLOOD {
                        let rate = count as f64 / time.as_secs_f64();
                        say(&format!("result {rate:.0}"));
                        break;
                    }
                    let factor = 1.3 * FLOOD_FOR.as_secs_f64() / time.as_secs_f64();
                    count = FLOOD.min((count as f64 * factor.clamp(1.3, 10.0)) as u64);
                }
            }
            _ => {
                mark(&mut event, END, false);
                publisher.send(&event)?;
                publisher.flush()?;
                // What is still on its way should not be cut off.
                std::thread::sleep(QUIET);
                return Ok(());
            }
        }
    }
}

/// Sends greetings until all have answered one.
fn meet(publisher: &mut dyn Publisher, streams: &[UnixStream]) -> Result<()> {
    let all = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let answered = scope.spawn(|| {
            let done = streams.iter().try_for_each(|mut stream| {
                let mut number = [0; 8];
                stream.read_exact(&mut number)
            });
            all.store(true, Ordering::Release);
            done
        });
        let mut event = vec![0; EVENT_BYTES];
        mark(&mut event, HELLO, true);
        while !all.load(Ordering::Acquire) {
            publisher.send(&event)?;
            std::thread::sleep(HELLO_EVERY);
        }
        match answered.join() {
            Ok(done) => Ok(done?),
            Err(_) => Err("the thread that hears the subscribers' answers panicked".into()),
        }
    })
}

/// The time from the first of `count` events until all subscribers have all of them.
fn flood(
    publisher: &mut dyn Publisher,
    answers: &mut Answers,
    window: Option<u64>,
    first: u64,
    count: u64,
) -> Result<Duration> {
    let mut event = vec![0; EVENT_BYTES];
    let end = first + count;
    let begin = Instant::now();
    for number in first..end {
        if let Some(window) = window
            && number.is_multiple_of(ANSWER_EVERY)
            && number > first + window
        {
            answers.wait(number - window)?;
        }
        let answer = (number + 1).is_multiple_of(ANSWER_EVERY) && window.is_some();
        mark(&mut event, number, answer || number + 1 == end);
        publisher.push(&event)?;
    }
    publisher.flush()?;
    answers.wait(end)?;
    Ok(begin.elapsed())
}

/// Takes all events, and insists on their order.
fn subscribe(system: &dyn System, place: &Place, index: &str) -> Result<()> {
    let mut answers = UnixStream::connect(place.file("answers"))?;
    let mut subscriber = system.subscriber(place)?;
    say("subscribed");
    let mut next = None;
    let mut ended = false;
    while !ended {
        subscriber.receive(None, &mut |event| {
            let (number, answer) = head(event)?;
            match number {
                END => ended = true,
                HELLO if next.is_none() => {
                    next = Some(0);
                    answers.write_all(&number.to_le_bytes())?;
                }
                HELLO => {}
                _ if next != Some(number) => {
                    let wanted = next.map_or("a greeting".into(), |next: u64| next.to_string());
                    return Err(format!(
                        "events were lost: subscriber {index} got {number}, not {wanted}"
                    )
                    .into());
                }
                _ => {
                    next = Some(number + 1);
                    if answer {
                        answers.write_all(&number.to_le_bytes())?;
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

const _: () = assert!(HEAD_BYTES <= EVENT_BYTES);
