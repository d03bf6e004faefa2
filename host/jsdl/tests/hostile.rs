//! No document makes the reader panic, and none makes it work for long.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use xbee_jsdl::limits::{
    MAX_ATTRIBUTES, MAX_DEPTH, MAX_DIAGNOSTICS, MAX_DOCUMENT_BYTES, MAX_ELEMENTS, MAX_NAMESPACES,
};
use xbee_jsdl::sweep::expand;
use xbee_jsdl::{Options, parse, verdict};

/// Longest time for a document of the largest size, on a loaded machine without optimisation.
const LONGEST: Duration = Duration::from_secs(10);

const SEED: &str = include_str!("../../../examples/povray.xsdl");

/// A sweep for it.
const SWEEP: &str = "<s:Sweep xmlns:s='http://schemas.ogf.org/jsdl/2009/03/sweep'\n\
    xmlns:f='http://schemas.ogf.org/jsdl/2009/03/sweep/functions'>\n<s:Assignment>\n<s:DocumentNode>\n\
    <s:NamespaceBinding prefix='p' ns='http://schemas.ggf.org/jsdl/2005/11/jsdl-posix'/>\n\
    <s:Match>substring(//p:Argument[1], 2, 1)</s:Match>\n</s:DocumentNode>\n\
    <f:LoopInteger start='1' end='5' step='2'>\n<f:Exception>3</f:Exception>\n</f:LoopInteger>\n\
    </s:Assignment>\n</s:Sweep>\n";

/// Reads a document in every way; what the ways say must fit together.
fn read_all(document: &[u8]) {
    let verdict = verdict(document);
    let strict = parse(document, &Options { lenient: false });
    let lenient = parse(document, &Options { lenient: true });
    if let Ok(parsed) = strict {
        assert_eq!(verdict, Ok(()), "a job must be valid");
        assert_eq!(lenient, Ok(parsed), "what is right needs no forgiving");
    }
    for lenient in [false, true] {
        let Ok(Some(sweep)) = expand(document, &Options { lenient }, 20) else {
            continue;
        };
        for member in sweep.jobs().flatten() {
            let alone = parse(member.document.as_bytes(), &Options { lenient: false });
            let alone = alone.map(|parsed| parsed.job);
            assert_eq!(alone, Ok(member.parsed.job), "{}", member.document);
        }
    }
}

/// The seed with a sweep in it.
fn swept() -> String {
    let document = SEED.replacen(
        "</jsdl:JobDefinition>",
        &format!("{SWEEP}</jsdl:JobDefinition>"),
        1,
    );
    let sweep = expand(document.as_bytes(), &Options::default(), 20);
    assert_eq!(
        sweep
            .expect("a sweep")
            .expect("a sweep")
            .jobs()
            .flatten()
            .count(),
        2
    );
    document
}

/// Pieces that mean something to the parser.
const TOKENS: &[&str] = &[
    "<",
    ">",
    "</",
    "/>",
    "<!--",
    "-->",
    "<![CDATA[",
    "]]>",
    "<?",
    "?>",
    "<?xml ",
    "<!DOCTYPE ",
    "&",
    ";",
    "&#",
    "&#x",
    "&amp;",
    "\"",
    "'",
    "=",
    " ",
    "\n",
    "\r",
    ":",
    "xmlns",
    "xmlns:a=\"b\"",
    "xsi:type=\"xsd:int\"",
    "[",
    "]",
    "\u{FEFF}",
    "\u{0}",
    "é",
    "jsdl:JobName",
    "jsdl:DataStaging",
    "xsdl:Location",
    "jsdl-posix:Executable",
    "s:Sweep",
    "p:Argument[1]",
    "//",
    "*",
    "substring(",
    ", 1, 1)",
    "text()",
    "1",
    "end='9'",
];

proptest! {
    #[test]
    fn any_bytes(document in proptest::collection::vec(any::<u8>(), 0..400)) {
        read_all(&document);
    }

    #[test]
    fn any_markup(tokens in proptest::collection::vec(proptest::sample::select(TOKENS), 0..60)) {
        read_all(tokens.concat().as_bytes());
    }

    #[test]
    fn mutated_documents(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..12, proptest::sample::select(TOKENS)), 1..6),
    ) {
        let mut document = swept().into_bytes();
        for (at, removed, token) in edits {
            let at = at.index(document.len());
            let end = (at + removed).min(document.len());
            document.splice(at..end, token.bytes());
        }
        read_all(&document);
        let utf16: Vec<u8> = String::from_utf8_lossy(&document).encode_utf16().flat_map(u16::to_le_bytes).collect();
        read_all(&[b"\xFF\xFE", utf16.as_slice()].concat());
    }

    #[test]
    fn shuffled_elements(seed in any::<u64>()) {
        // Lines hold whole tags, so that swapping them keeps many documents well-formed.
        let document = swept();
        let mut lines: Vec<&str> = document.lines().collect();
        let mut state = seed;
        for _ in 0..8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (a, b) = ((state >> 33) as usize % lines.len(), (state >> 13) as usize % lines.len());
            lines.swap(a, b);
        }
        read_all(lines.join("\n").as_bytes());
    }
}

#[track_caller]
fn code_within_time(document: &str) -> Option<&'static str> {
    let timed = |lenient| {
        let start = Instant::now();
        let result = parse(document.as_bytes(), &Options { lenient });
        let took = start.elapsed();
        assert!(took < LONGEST, "{took:?}");
        if let Err(findings) = &result {
            assert!(findings.len() <= MAX_DIAGNOSTICS);
        }
        result.err().map(|findings| findings[0].code)
    };
    timed(true);
    timed(false)
}

const OPEN: &str = "<j:JobDefinition xmlns:j='http://schemas.ggf.org/jsdl/2005/11/jsdl' xmlns:f='urn:f'>\
                    <j:JobDescription>";
const CLOSE: &str = "</j:JobDescription></j:JobDefinition>";

/// A document of nearly the largest size, its body made of repeated pieces.
fn filled(piece: impl Fn(usize) -> String) -> String {
    let mut document = OPEN.to_owned();
    for n in 0.. {
        let piece = piece(n);
        if document.len() + piece.len() + CLOSE.len() > MAX_DOCUMENT_BYTES {
            break;
        }
        document.push_str(&piece);
    }
    document + CLOSE
}

#[test]
fn size_is_bounded() {
    let document = format!("{OPEN}{}{CLOSE}", " ".repeat(MAX_DOCUMENT_BYTES));
    assert_eq!(code_within_time(&document), Some("document-too-large"));
    let longest = filled(|_| " ".to_owned());
    assert_eq!(longest.len(), MAX_DOCUMENT_BYTES);
    assert_eq!(code_within_time(&longest), None);
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| {
        let inside = depth - 2;
        format!(
            "{OPEN}{}{}{CLOSE}",
            "<f:x>".repeat(inside),
            "</f:x>".repeat(inside)
        )
    };
    assert_eq!(code_within_time(&nested(MAX_DEPTH)), None);
    assert_eq!(
        code_within_time(&nested(MAX_DEPTH + 1)),
        Some("document-too-deep")
    );
}

#[test]
fn counts_are_bounded() {
    let elements = |count: usize| format!("{OPEN}{}{CLOSE}", "<f:x/>".repeat(count - 2));
    assert_eq!(code_within_time(&elements(MAX_ELEMENTS)), None);
    assert_eq!(
        code_within_time(&elements(MAX_ELEMENTS + 1)),
        Some("document-too-large")
    );
    let namespaces = |count: usize| {
        // Two are declared outside; each of five elements declares a part of the rest.
        let parts = 5;
        let open: String = (0..parts)
            .map(|part| {
                let list: String = (part..count - 2)
                    .step_by(parts)
                    .map(|n| format!(" xmlns:n{n}='urn:n'"))
                    .collect();
                format!("<f:x{list}>")
            })
            .collect();
        format!("{OPEN}{open}{}{CLOSE}", "</f:x>".repeat(parts))
    };
    assert_eq!(code_within_time(&namespaces(MAX_NAMESPACES)), None);
    assert_eq!(
        code_within_time(&namespaces(MAX_NAMESPACES + 1)),
        Some("document-too-large")
    );
    let attributes = |count: usize| {
        let list: String = (0..count).map(|n| format!(" a{n}=''")).collect();
        format!("{OPEN}<f:x{list}/>{CLOSE}")
    };
    assert_eq!(code_within_time(&attributes(MAX_ATTRIBUTES)), None);
    assert_eq!(
        code_within_time(&attributes(MAX_ATTRIBUTES + 1)),
        Some("document-too-large")
    );
}

#[test]
fn entities_are_refused() {
    let mut bomb = "<!DOCTYPE a [<!ENTITY a0 'ha'>".to_owned();
    for n in 1..30 {
        bomb.push_str(&format!("<!ENTITY a{n} '&a{0};&a{0};'>", n - 1));
    }
    bomb.push_str("]><a>&a29;</a>");
    assert_eq!(code_within_time(&bomb), Some("entity-declaration"));
    let external = "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>";
    assert_eq!(code_within_time(external), Some("entity-declaration"));
}

/// Documents that would take long if anything took the square of their size.
#[test]
fn time_is_bounded() {
    let nested_scopes = {
        let levels = MAX_DEPTH - 4;
        let scopes = MAX_NAMESPACES / levels;
        let open: String = (0..levels)
            .map(|level| {
                let namespaces: String = (0..scopes - 1)
                    .map(|n| format!(" xmlns:n{level}-{n}='urn:n'"))
                    .collect();
                format!("<f:x{namespaces}>")
            })
            .collect();
        format!(
            "{OPEN}{open}{}{}{CLOSE}",
            "<f:y/>".repeat(40_000),
            "</f:x>".repeat(levels)
        )
    };
    let documents = [
        filled(|n| format!("<f:x a='{n}'>{n}</f:x>")),
        filled(|n| format!("<f:x xmlns:p{n}='urn:{n}'/>")),
        filled(|_| "<j:DataStaging/>".to_owned()),
        filled(|_| "<j:JobName/><f:x/>".to_owned()),
        filled(|_| "<j:TotalCPUCount>x</j:TotalCPUCount>".to_owned()),
        filled(|_| "x&amp;".to_owned()),
        filled(|_| "<!--x--><![CDATA[ ]]>".to_owned()),
        filled(|_| "<j:JobIdentification/><j:Application/>".to_owned()),
        format!("{OPEN}<f:x a='{}'/>{CLOSE}", "&lt;".repeat(200_000)),
        format!("{OPEN}<j:{}/>{CLOSE}", "x".repeat(900_000)),
        nested_scopes,
    ];
    for document in documents {
        assert!(document.len() <= MAX_DOCUMENT_BYTES);
        code_within_time(&document);
    }
}
