//! Parameter sweeps: which jobs they make, and what keeps them from it.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use proptest::prelude::*;
use xbee_jsdl::limits::{
    MAX_DOCUMENT_BYTES, MAX_SWEEP_BYTES, MAX_SWEEP_DEPTH, MAX_SWEEP_JOBS, MAX_SWEEP_MATCHES,
};
use xbee_jsdl::sweep::{Member, Sweep, expand};
use xbee_jsdl::{Diagnostic, Options, parse, verdict};

const STRICT: Options = Options { lenient: false };

/// A job with places to put values.
const DESCRIPTION: &str = "<JobDescription>\
    <JobIdentification><JobName>run-A-B</JobName></JobIdentification>\
    <Application><p:POSIXApplication>\
    <p:Executable>/bin/echo</p:Executable><p:Argument>one</p:Argument><p:Argument>two</p:Argument>\
    <p:Environment name='N'>v</p:Environment>\
    </p:POSIXApplication></Application></JobDescription>";

const NAME: &str = "/j:JobDefinition/j:JobDescription/j:JobIdentification/j:JobName";
const FIRST: &str = "//p:Argument[1]";
const SECOND: &str = "//p:Argument[2]";

fn document(sweeps: &str) -> String {
    format!(
        "<JobDefinition xmlns='http://schemas.ggf.org/jsdl/2005/11/jsdl'\n \
         xmlns:p='http://schemas.ggf.org/jsdl/2005/11/jsdl-posix'\n \
         xmlns:s='http://schemas.ogf.org/jsdl/2009/03/sweep'\n \
         xmlns:f='http://schemas.ogf.org/jsdl/2009/03/sweep/functions'>\n{DESCRIPTION}\n{sweeps}\n\
         </JobDefinition>"
    )
}

fn sweep(inside: &[&str]) -> String {
    format!("<s:Sweep>{}</s:Sweep>", inside.concat())
}

fn node(expression: &str) -> String {
    format!(
        "<s:DocumentNode>\
         <s:NamespaceBinding prefix='j' ns='http://schemas.ggf.org/jsdl/2005/11/jsdl'/>\
         <s:NamespaceBinding ns='http://schemas.ggf.org/jsdl/2005/11/jsdl-posix' prefix='p'> \
         </s:NamespaceBinding><s:Match>{expression}</s:Match></s:DocumentNode>"
    )
}

fn assign(expression: &str, function: &str) -> String {
    format!(
        "<s:Assignment>{}{function}</s:Assignment>",
        node(expression)
    )
}

fn values(list: &[&str]) -> String {
    let list: String = list
        .iter()
        .map(|value| format!("<f:Value>{value}</f:Value>"))
        .collect();
    format!("<f:Values>{list}</f:Values>")
}

fn numbers(last: u64) -> String {
    format!("<f:LoopInteger start='1' end='{last}'/>")
}

fn read(document: &str) -> Result<Sweep, Vec<Diagnostic>> {
    expand(document.as_bytes(), &STRICT, MAX_SWEEP_JOBS).map(|sweep| sweep.expect("a sweep"))
}

/// All jobs, after it was seen that each is what its own document says.
#[track_caller]
fn members(sweeps: &str) -> Vec<Member> {
    let sweep = read(&document(sweeps)).unwrap();
    let members: Vec<Member> = sweep.jobs().collect::<Result<_, _>>().unwrap();
    assert_eq!(sweep.count(), members.len() as u64);
    for (number, member) in (1..).zip(&members) {
        assert_eq!(member.number, number);
        let alone = parse(member.document.as_bytes(), &STRICT).expect(&member.document);
        assert_eq!(alone, member.parsed, "{}", member.document);
        let again = expand(member.document.as_bytes(), &STRICT, 0).unwrap();
        assert!(again.is_none(), "a member has no sweep");
    }
    members
}

/// Name and arguments of each job.
#[track_caller]
fn jobs(sweeps: &str) -> Vec<String> {
    let jobs = members(sweeps).into_iter().map(|member| {
        let job = member.parsed.job;
        let process = job.application.kind.process().expect("a process").clone();
        let arguments = process.arguments.into_iter().map(|argument| argument.value);
        let words: Vec<String> = job
            .identification
            .name
            .into_iter()
            .chain(arguments)
            .collect();
        words.join(" ")
    });
    jobs.collect()
}

#[track_caller]
fn codes(sweeps: &str) -> Vec<&'static str> {
    let findings = read(&document(sweeps)).expect_err("no sweep");
    findings.iter().map(|finding| finding.code).collect()
}

#[test]
fn a_value_goes_to_each_place_that_an_assignment_names() {
    let both = format!(
        "<s:Assignment>{}{}{}</s:Assignment>",
        node(NAME),
        node(SECOND),
        values(&["x", "y"])
    );
    assert_eq!(jobs(&sweep(&[&both])), ["x one x", "y one y"]);
}

#[test]
fn assignments_beside_each_other_go_in_lock_step() {
    let (first, second) = (
        assign(FIRST, &numbers(3)),
        assign(SECOND, &values(&["a", "b", "c"])),
    );
    assert_eq!(
        jobs(&sweep(&[&first, &second])),
        ["run-A-B 1 a", "run-A-B 2 b", "run-A-B 3 c"]
    );
    let longer = assign(SECOND, &numbers(4));
    assert_eq!(codes(&sweep(&[&first, &longer])), ["unequal-assignments"]);
}

#[test]
fn a_sweep_in_another_runs_through_in_each_round() {
    let inner = sweep(&[&assign(SECOND, &numbers(2))]);
    let nested = sweep(&[&assign(FIRST, &values(&["a", "b"])), &inner]);
    assert_eq!(
        jobs(&nested),
        ["run-A-B a 1", "run-A-B a 2", "run-A-B b 1", "run-A-B b 2"]
    );
}

#[test]
fn sweeps_beside_each_other_follow_one_another() {
    let (first, second) = (
        sweep(&[&assign(FIRST, &numbers(2))]),
        sweep(&[
            &assign(SECOND, &numbers(1)),
            &sweep(&[&assign(NAME, &values(&["n"]))]),
        ]),
    );
    let expected = ["run-A-B 1 two", "run-A-B 2 two", "n one 1"];
    assert_eq!(jobs(&format!("{first}{second}")), expected);
    assert_eq!(
        jobs(&sweep(&[&first, &second])),
        expected,
        "one without assignments"
    );
    let outer = sweep(&[
        &assign("//p:Environment/@name", &values(&["A", "B"])),
        &first,
        &second,
    ]);
    assert_eq!(jobs(&outer), [expected, expected].concat());
}

#[test]
fn a_member_says_what_is_its_own() {
    let sweeps = sweep(&[
        &assign(&format!("substring({NAME}, 5, 1)"), &numbers(2)),
        &assign(SECOND, &values(&["&lt;x&gt;", " y\n"])),
        &assign("//p:Environment/@name", &values(&["P", "Q"])),
    ]);
    let members = members(&sweeps);
    let assigned: Vec<(&str, &str)> = members[1]
        .assignments
        .iter()
        .map(|assigned| (&*assigned.place, &*assigned.value))
        .collect();
    assert_eq!(
        assigned,
        [
            ("JobIdentification/JobName", "2"),
            ("Application/POSIXApplication/Argument[2]", "y"),
            ("Application/POSIXApplication/Environment/@name", "Q"),
        ]
    );
    let process = members[1].parsed.job.application.kind.process().unwrap();
    assert_eq!(process.environment[0].name, "Q");
    assert!(
        members[0]
            .document
            .contains("<p:Argument>&lt;x&gt;</p:Argument>")
    );
    assert!(!members[0].document.contains("Sweep"));
}

#[test]
fn parts_of_a_text_are_replaced_where_they_stand_in_the_document() {
    let part = |from: u32, length: &str| format!("substring({NAME}, {from}{length})");
    // The second part stays where it is when the first one grows, in whatever order they are given.
    let (a, b) = (
        assign(&part(5, ", 1"), &values(&["long", ""])),
        assign(&part(7, ", 1"), &numbers(2)),
    );
    let expected = ["run-long-1 one two", "run--2 one two"];
    assert_eq!(jobs(&sweep(&[&a, &b])), expected);
    assert_eq!(jobs(&sweep(&[&b, &a])), expected);
    for (from, length, name) in [
        (5, "", "run-x"),
        (6, ", 99", "run-Ax"),
        (0, ", 3", "xn-A-B"),
        (1, ", 0", "xrun-A-B"),
        (8, ", 0", "run-A-Bx"),
    ] {
        let sweeps = sweep(&[&assign(&part(from, length), &values(&["x"]))]);
        assert_eq!(jobs(&sweeps), [format!("{name} one two")], "{from}{length}");
    }
    for (from, length) in [
        (8, ", 1"),
        (8, ""),
        (0, ", 1"),
        (0, ", 0"),
        (9, ", 0"),
        (99, ", 1"),
    ] {
        let sweeps = sweep(&[&assign(&part(from, length), &values(&["x"]))]);
        assert_eq!(codes(&sweeps), ["match-finds-nothing"], "{from}{length}");
    }
    let umlauts =
        document(&sweep(&[&assign(&part(5, ", 1"), &values(&["ü"]))])).replace("run-A", "rün€A");
    let sweep = read(&umlauts).unwrap();
    let member = sweep.jobs().next().unwrap().unwrap();
    assert_eq!(
        member.parsed.job.identification.name.as_deref(),
        Some("rün€ü-B")
    );
}

#[test]
fn two_values_for_one_place_are_refused() {
    let part = |from: u32, to: u32| {
        assign(
            &format!("substring({NAME}, {from}, {})", to - from),
            &numbers(2),
        )
    };
    for (a, b) in [
        (
            assign(NAME, &numbers(2)),
            assign("//j:JobName/text()", &numbers(2)),
        ),
        (assign(NAME, &numbers(2)), part(1, 2)),
        (part(1, 4), part(3, 5)),
        (part(1, 4), part(2, 2)),
        (part(2, 2), part(2, 3)),
    ] {
        assert_eq!(codes(&sweep(&[&a, &b])), ["overlapping-matches"]);
        assert_eq!(codes(&sweep(&[&a, &sweep(&[&b])])), ["overlapping-matches"]);
        // Not for the same job.
        assert_eq!(
            members(&format!("{}{}", sweep(&[&a]), sweep(&[&b]))).len(),
            4
        );
    }
    assert_eq!(members(&sweep(&[&part(1, 2), &part(2, 3)])).len(), 2);
}

#[test]
fn a_bad_job_is_named() {
    let limit = DESCRIPTION.replace(
        "</p:POSIXApplication>",
        "<p:WallTimeLimit>1</p:WallTimeLimit></p:POSIXApplication>",
    );
    let sweeps = sweep(&[
        &assign("//p:WallTimeLimit", &values(&["1", "-x", "3"])),
        &assign(FIRST, &values(&["a", "b", "c"])),
    ]);
    let sweep = read(&document(&sweeps).replace(DESCRIPTION, &limit)).unwrap();
    let jobs: Vec<_> = sweep.jobs().collect();
    assert!(jobs[0].is_ok() && jobs[2].is_ok());
    let findings = jobs[1].as_ref().unwrap_err();
    assert_eq!(findings.len(), 1);
    assert_eq!((findings[0].line, findings[0].code), (5, "invalid-value"));
    assert_eq!(
        findings[0].message,
        "job 2 of 3 (Application/POSIXApplication/WallTimeLimit = -x, \
         Application/POSIXApplication/Argument[1] = b): '-x' is not a value of \
         jsdl-posix:WallTimeLimit, expected a whole number, 0 or more"
    );
}

#[test]
fn what_a_document_has_besides_goes_into_each_job() {
    let foreign = "<o:x xmlns:o='urn:o' a='1' o:b='&#10;&amp;'><y xmlns=''>&#13;<z/></y></o:x>";
    let document = document(&sweep(&[&assign(FIRST, &numbers(2))])).replace(
        "</JobDescription>",
        &format!("<!-- c -->{foreign}</JobDescription>"),
    );
    let sweep = read(&document).unwrap();
    for member in sweep.jobs() {
        let member = member.unwrap();
        assert!(member.document.contains(
            "<o:x xmlns:o=\"urn:o\" a=\"1\" o:b=\"&#10;&amp;\"><y xmlns=\"\">&#13;<z/></y></o:x>"
        ), "{}", member.document);
        assert_eq!(member.parsed.warnings.len(), 1);
        let alone = parse(member.document.as_bytes(), &STRICT).unwrap();
        assert_eq!(alone.job, member.parsed.job);
    }
}

#[test]
fn lenient_documents_are_repaired_first() {
    let document = document(&sweep(&[&assign(FIRST, &numbers(2))]))
        .replace("<Application>", "")
        .replace("</Application>", "")
        .replace(
            "xmlns:p='http://schemas.ggf.org/jsdl/2005/11/jsdl-posix'",
            "",
        )
        .replace("<p:", "<jsdl-posix:")
        .replace("</p:", "</jsdl-posix:");
    assert!(expand(document.as_bytes(), &STRICT, 9).is_err());
    let sweep = expand(document.as_bytes(), &Options { lenient: true }, 9)
        .unwrap()
        .unwrap();
    assert_eq!(sweep.forgiven().len(), 2);
    for member in sweep.jobs() {
        let member = member.unwrap();
        let alone = parse(member.document.as_bytes(), &STRICT).expect(&member.document);
        assert_eq!(alone.job, member.parsed.job);
        let process = alone.job.application.kind.process().unwrap().clone();
        assert_eq!(process.arguments[0].value, member.number.to_string());
    }
}

#[test]
fn a_document_without_sweep_is_none() {
    assert!(
        expand(document("").as_bytes(), &STRICT, 0)
            .unwrap()
            .is_none()
    );
    let misplaced = document("").replace("</JobDescription>", "<s:Sweep/></JobDescription>");
    assert!(expand(misplaced.as_bytes(), &STRICT, 0).unwrap().is_none());
    let findings = parse(misplaced.as_bytes(), &STRICT).unwrap_err();
    assert_eq!(findings[0].code, "unsupported-sweep");
    let findings = expand(b"<a", &STRICT, 0).unwrap_err();
    assert_eq!(findings[0].code, "not-well-formed");
}

#[test]
fn what_is_no_sweep_is_refused() {
    let loop_ = numbers(2);
    for (sweeps, code) in [
        (sweep(&[]), "missing-element"),
        (sweep(&[&sweep(&[])]), "missing-element"),
        (sweep(&["<s:Assignment/>"]), "missing-element"),
        (sweep(&["text"]), "unexpected-text"),
        (
            sweep(&[&format!("<s:Assignment>{loop_}</s:Assignment>")]),
            "unexpected-element",
        ),
        (
            sweep(&[&format!("<s:Assignment>{}</s:Assignment>", node(NAME))]),
            "missing-element",
        ),
        (
            sweep(&[&assign(NAME, &loop_.repeat(2))]),
            "unexpected-element",
        ),
        (sweep(&[&assign(NAME, "<f:Values/>")]), "missing-element"),
        (
            sweep(&[&assign(NAME, "<f:LoopInteger start='1'/>")]),
            "missing-attribute",
        ),
        (
            sweep(&[&assign(NAME, "<f:LoopInteger start='1' end='2.5'/>")]),
            "invalid-attribute",
        ),
        (
            sweep(&[&assign(NAME, "<f:LoopInteger start='1' end='2' stop='3'/>")]),
            "unexpected-attribute",
        ),
        (
            sweep(&[&assign(NAME, "<f:LoopDouble start='1' end='2'/>")]),
            "missing-attribute",
        ),
        (
            sweep(&[&assign(
                NAME,
                "<f:LoopDouble start='1' end='2' step='NaN'/>",
            )]),
            "invalid-loop",
        ),
        (
            sweep(&[&assign(NAME, "<f:Directory/>")]),
            "unsupported-sweep",
        ),
        (
            sweep(&[&format!(
                "<s:Assignment><s:FileSweep/>{loop_}</s:Assignment>"
            )]),
            "unsupported-sweep",
        ),
        (
            sweep(&[&assign("//j:Nowhere", &loop_)]),
            "match-finds-nothing",
        ),
        (
            sweep(&[&assign("//p:Argument", &loop_)]),
            "match-finds-several",
        ),
        (sweep(&[&assign("//s:Match", &loop_)]), "undeclared-prefix"),
        (
            sweep(&[&assign("//j:JobDescription", &loop_)]),
            "unsupported-match",
        ),
        (sweep(&[&assign("id('x')", &loop_)]), "unsupported-match"),
        (
            sweep(&[&assign(NAME, &loop_).replace("prefix='j'", "")]),
            "missing-attribute",
        ),
    ] {
        assert_eq!(codes(&sweeps)[0], code, "{sweeps}");
    }
}

#[test]
fn findings_have_their_place() {
    let sweeps = format!(
        "\n\n {}",
        sweep(&["\n", &assign("//j:Nowhere", &numbers(2))])
    );
    let findings = read(&document(&sweeps)).unwrap_err();
    let expected = document(&sweeps)
        .lines()
        .position(|line| line.contains("Nowhere"))
        .unwrap();
    assert_eq!(findings[0].line as usize, expected + 1);
    let sweep = read(&document(&sweeps.replace("Nowhere", "JobName"))).unwrap();
    assert_eq!((sweep.line(), sweep.column()), (8, 2));
}

#[test]
fn size_is_bounded() {
    let nested = |depth: usize, last: u64| {
        (0..depth).fold(String::new(), |inner, level| {
            // Each level has a place of its own.
            let place = format!("substring(//p:Executable, {}, 1)", level + 1);
            sweep(&[&assign(&place, &numbers(last)), &inner])
        })
    };
    let count = |sweeps: &str, most: u64| {
        let result = expand(document(sweeps).as_bytes(), &STRICT, most);
        result
            .map(|sweep| sweep.unwrap().count())
            .map_err(|findings| findings[0].clone())
    };
    assert_eq!(count(&nested(1, 7), 7), Ok(7));
    assert_eq!(count(&nested(MAX_SWEEP_DEPTH, 2), 256), Ok(256));
    for (sweeps, most, reason) in [
        (nested(1, 7), 6, "has 7 jobs"),
        (nested(1, 100_000), MAX_SWEEP_JOBS, "has 100000 jobs"),
        (nested(2, 1 << 40), u64::MAX, "more than"),
        (nested(3, 1 << 31).repeat(3), u64::MAX, "more than"),
        (nested(1, 10_u64.pow(17)).repeat(200), u64::MAX, "more than"),
        (nested(1, MAX_SWEEP_BYTES), u64::MAX, "together"),
        (nested(MAX_SWEEP_DEPTH + 1, 1), 256, "nested deeper"),
        (
            nested(1, 2).repeat(MAX_SWEEP_MATCHES + 1),
            u64::MAX,
            "more than 256 matches",
        ),
    ] {
        let finding = count(&sweeps, most).unwrap_err();
        assert_eq!(finding.code, "sweep-too-large");
        assert!(finding.message.contains(reason), "{finding}");
    }
    // A long value in many places.
    let long = "x".repeat(MAX_DOCUMENT_BYTES / 8);
    let argument = "<p:Argument>two</p:Argument>";
    let places: String = (1..10)
        .map(|n| node(&format!("//p:Argument[{n}]")))
        .collect();
    let many = sweep(&[&format!(
        "<s:Assignment>{places}{}</s:Assignment>",
        values(&[&long])
    )]);
    let findings = read(&document(&many).replace(argument, &argument.repeat(9))).unwrap_err();
    assert_eq!(findings[0].code, "sweep-too-large");
    assert!(
        findings[0].message.contains("a job of the sweep"),
        "{}",
        findings[0]
    );
}

/// As long as the largest that people submit; the figures are printed.
#[test]
fn a_thousand_jobs() {
    let places = format!(
        "{}{}",
        node(&format!("substring({NAME}, 5, 1)")),
        node(FIRST)
    );
    let text = document(&sweep(&[&format!(
        "<s:Assignment>{places}{}</s:Assignment>",
        numbers(1000)
    )]));
    let start = Instant::now();
    let sweep = read(&text).unwrap();
    let counted = start.elapsed();
    let members: Vec<Member> = sweep.jobs().collect::<Result<_, _>>().unwrap();
    println!(
        "1,000 jobs: counted in {counted:?}, made in {:?}",
        start.elapsed()
    );
    let name = |member: &Member| member.parsed.job.identification.name.clone().unwrap();
    assert_eq!(name(&members[0]), "run-1-B");
    assert_eq!(name(&members[999]), "run-1000-B");
    let text = text.replace("end='1000'", "end='100000'");
    let start = Instant::now();
    let findings = read(&text).unwrap_err();
    println!("100,000 refused in {:?}", start.elapsed());
    assert_eq!(findings[0].code, "sweep-too-large");
}

/// Values of any characters that XML has.
fn value() -> impl Strategy<Value = String> {
    let characters = "([a-z0-9 <>&'\"/]|\u{e9}|\u{1F600}|&#9;|&#10;|&#13;|]]>){0,6}";
    let escaped = proptest::string::string_regex(characters).expect("a pattern");
    escaped.prop_map(|text| {
        let text = text.replace("]]>", "]]&gt;").replace('<', "&lt;");
        // References stay, all other ampersands are escaped.
        let escaped = text.replace('&', "&amp;");
        ["lt", "gt", "#9", "#10", "#13"]
            .iter()
            .fold(escaped, |text, name| {
                text.replace(&format!("&amp;{name};"), &format!("&{name};"))
            })
    })
}

proptest! {
    #[test]
    fn members_are_what_their_documents_say(
        first in proptest::collection::vec(value(), 1..4), second in proptest::collection::vec(value(), 1..4),
        part in proptest::collection::vec(value(), 1..4), from in 0_u32..9, length in 0_u32..9,
        preserve in any::<bool>(),
    ) {
        let list = |of: &[String]| {
            let kept = if preserve { " xml:space='preserve'" } else { "" };
            let list: String = of.iter().map(|value| format!("<f:Value{kept}>{value}</f:Value>")).collect();
            format!("<f:Values>{list}</f:Values>")
        };
        let inner = sweep(&[&assign(SECOND, &list(&second))]);
        let beside = sweep(&[&assign(&format!("substring({NAME}, {from}, {length})"), &list(&part))]);
        let sweeps = sweep(&[&assign(FIRST, &list(&first)), &inner, &beside]);
        match read(&document(&sweeps)) {
            Err(findings) => prop_assert_eq!(findings[0].code, "match-finds-nothing"),
            Ok(sweep) => {
                let product = first.len() * (second.len() + part.len());
                prop_assert_eq!(sweep.count(), product as u64);
                for member in sweep.jobs() {
                    let member = member.expect("any text is a name and an argument");
                    let alone = parse(member.document.as_bytes(), &STRICT);
                    prop_assert_eq!(alone, Ok(member.parsed));
                    prop_assert_eq!(verdict(member.document.as_bytes()), Ok(()));
                }
            }
        }
    }
}
