//! The codec: round trips, pieces of any size, and what is refused.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use xbee_mq::decode::{Decoder, FrameLimits, Malformed};
use xbee_mq::frame::{Command, Frame, Headers, Version};

/// All frames in these pieces, and the error that ended them.
fn frames<'a>(
    version: Version,
    limits: FrameLimits,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Frame>, Option<Malformed>) {
    let mut decoder = Decoder::new(version, limits);
    let mut frames = Vec::new();
    for mut piece in pieces {
        while !piece.is_empty() {
            match decoder.decode(&mut piece) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => assert!(piece.is_empty(), "bytes are left, and no frame came"),
                Err(malformed) => return (frames, Some(malformed)),
            }
        }
    }
    (frames, None)
}

fn one(version: Version, bytes: &[u8]) -> Result<Frame, Malformed> {
    let (mut frames, error) = frames(version, FrameLimits::default(), [bytes]);
    match error {
        Some(error) => Err(error),
        None => {
            assert_eq!(frames.len(), 1, "{frames:?}");
            Ok(frames.remove(0))
        }
    }
}

fn header(version: Version, line: &str) -> Result<(String, String), Malformed> {
    let frame = one(version, format!("SEND\n{line}\n\n\0").as_bytes())?;
    let (name, value) = frame.headers.iter().next().unwrap();
    Ok((name.into(), value.into()))
}

fn pair(name: &str, value: &str) -> Result<(String, String), Malformed> {
    Ok((name.into(), value.into()))
}

#[test]
fn escapes_are_those_of_the_version() {
    use Version::*;
    assert_eq!(
        header(V1_2, r"a\c\n\r\\b:v\c\n\r\\"),
        pair("a:\n\r\\b", "v:\n\r\\")
    );
    assert_eq!(header(V1_1, r"a:\c\n\\"), pair("a", ":\n\\"));
    assert_eq!(header(V1_0, r"a:\c\n\r\t\"), pair("a", r"\c\n\r\t\"));
    for (version, line) in [
        (V1_1, r"a:\r"),
        (V1_1, r"a:\t"),
        (V1_2, r"a:\t"),
        (V1_2, r"a:\"),
        (V1_2, r"\x:a"),
        (V1_2, r"a:\é"),
    ] {
        assert!(
            matches!(header(version, line), Err(Malformed::Escape(_))),
            "{line}"
        );
    }
}

#[test]
fn connect_and_connected_have_no_escapes() {
    for command in ["CONNECT", "STOMP", "CONNECTED"] {
        let frame = one(
            Version::V1_2,
            format!("{command}\nlogin:a\\c\\tb\n\n\0").as_bytes(),
        );
        assert_eq!(frame.unwrap().headers.get("login"), Some(r"a\c\tb"));
    }
    let mut out = Vec::new();
    let frame = Frame::new(Command::Connect).header("passcode", r"a\b:c");
    frame.encode(Version::V1_2, &mut out);
    assert_eq!(out, b"CONNECT\npasscode:a\\b:c\n\n\0");
}

#[test]
fn lines_may_end_in_cr_lf() {
    let text = b"SEND\r\na:b\r\ncontent-length:3\r\n\r\nx\r\n\0";
    for version in Version::ALL {
        let frame = one(version, text).unwrap();
        assert_eq!(
            (frame.headers.get("a"), &frame.body[..]),
            (Some("b"), &b"x\r\n"[..])
        );
    }
    // Where lines end in LF, CR belongs to a header of 1.1, and is an error in 1.2 unless it ends the line.
    assert_eq!(header(Version::V1_1, "a:b\r"), pair("a", "b\r"));
    assert_eq!(header(Version::V1_2, "a:b\r"), pair("a", "b"));
    assert_eq!(
        header(Version::V1_2, "a:b\rc"),
        Err(Malformed::CarriageReturn)
    );
}

#[test]
fn the_first_of_repeated_headers_counts_and_colons_in_values_are_taken() {
    let frame = one(Version::V1_2, b"SEND\na:1\na:2\nu:http://x:1\n\n\0").unwrap();
    assert_eq!(frame.headers.get("a"), Some("1"));
    assert_eq!(frame.headers.get("u"), Some("http://x:1"));
    assert_eq!(frame.headers.len(), 3);
}

#[test]
fn only_1_0_trims() {
    assert_eq!(header(Version::V1_0, " a : b "), pair("a", "b"));
    assert_eq!(header(Version::V1_1, " a : b "), pair(" a ", " b "));
    assert_eq!(header(Version::V1_2, " a : b "), pair(" a ", " b "));
}

#[test]
fn bodies_end_where_their_length_or_nul_says() {
    let (all, error) = frames(
        Version::V1_2,
        FrameLimits::default(),
        [&b"\n\r\n\nSEND\ncontent-length:3\n\na\0b\0\n\n\nSEND\n\nab\0SEND\ncontent-length:0\n\n\0\n"[..]],
    );
    assert_eq!(error, None);
    let bodies: Vec<_> = all.iter().map(|frame| &frame.body[..]).collect();
    assert_eq!(bodies, [&b"a\0b"[..], b"ab", b""]);
    // The first content-length counts, too.
    let frame = one(
        Version::V1_2,
        b"SEND\ncontent-length:1\ncontent-length:9\n\na\0",
    )
    .unwrap();
    assert_eq!(frame.body, b"a");
}

#[test]
fn the_specifications_example_of_disconnect_is_taken() {
    let frame = one(Version::V1_2, b"DISCONNECT\nreceipt:77\n\0").unwrap();
    assert_eq!(frame.headers.get("receipt"), Some("77"));
    assert!(one(Version::V1_2, b"SEND\na:b\n\0").is_err());
}

#[test]
fn what_is_no_frame_is_refused_as_soon_as_that_is_clear() {
    use Malformed as M;
    let error = |bytes: &[u8]| frames(Version::V1_2, FrameLimits::default(), [bytes]).1;
    let text = |s: &str| s.to_owned();
    assert_eq!(
        error(b"GET / HTTP/1.1\r\n"),
        Some(M::Command(text("GET / HTTP/1.1")))
    );
    assert_eq!(error(b"send\n"), Some(M::Command(text("send"))));
    assert_eq!(error(b"SEND \n"), Some(M::Command(text("SEND "))));
    assert!(
        matches!(error(b"\x16\x03\x01\x02\x00\x01"), Some(M::Command(_))),
        "TLS"
    );
    assert!(matches!(error(b"aaaaaaaaaaaaaaaaa"), Some(M::Command(_))));
    assert_eq!(error(b"SEND\nabc\n"), Some(M::NoColon(text("abc"))));
    assert_eq!(error(b"SEND\n:abc\n"), Some(M::NoName));
    assert_eq!(error(b"SEND\na:\xff\n"), Some(M::NotUtf8));
    assert_eq!(error(b"SEND\na:b\0"), Some(M::Nul));
    assert_eq!(error(b"SEND\na:b\0c\n"), Some(M::Nul));
    for length in ["", "-1", "+1", "1x", " 1"] {
        let bytes = format!("SEND\ncontent-length:{length}\n\n");
        assert_eq!(
            error(bytes.as_bytes()),
            Some(M::ContentLength(text(length)))
        );
    }
    assert_eq!(
        error(b"SEND\ncontent-length:1\n\nab\0"),
        Some(M::Unterminated(1))
    );
}

#[test]
fn limits_hold_before_what_is_too_much_has_come() {
    use Malformed as M;
    let limits = FrameLimits {
        headers: 2,
        header_line_bytes: 10,
        header_bytes: 15,
        body_bytes: 4,
    };
    let error = |bytes: &[u8]| frames(Version::V1_2, limits, [bytes]).1;
    assert_eq!(error(b"SEND\na:1\nb:1\n\n1234\0"), None);
    assert_eq!(error(b"SEND\na:1\nb:1\nc:1\n"), Some(M::TooManyHeaders(2)));
    assert_eq!(error(b"SEND\na:12345678"), None);
    assert_eq!(error(b"SEND\na:123456789\n"), Some(M::LineTooLong(10)));
    assert_eq!(error(b"SEND\na:1234567890"), Some(M::LineTooLong(10)));
    assert_eq!(
        error(b"SEND\na:12345678\nb:1234\n"),
        Some(M::HeadersTooLong(15))
    );
    assert_eq!(error(b"SEND\n\n12345"), Some(M::BodyTooLong(4)));
    let lines = FrameLimits {
        header_line_bytes: 100,
        header_bytes: 100,
        ..limits
    };
    let error = |length: &str| {
        let bytes = format!("SEND\ncontent-length:{length}\n\n");
        frames(Version::V1_2, lines, [bytes.as_bytes()]).1
    };
    assert_eq!(error("4"), None);
    assert_eq!(error("5"), Some(M::BodyTooLong(4)));
    assert_eq!(error("99999999999999999999999"), Some(M::BodyTooLong(4)));
}

#[test]
fn a_passcode_is_not_shown() {
    let frame = Frame::new(Command::Connect).header("passcode", "secret");
    assert!(!format!("{frame:?}").contains("secret"));
}

fn any_frame(version: Version) -> impl Strategy<Value = Frame> {
    // What 1.0 has no way to write is not among its frames: colons in names, and line feeds and padding anywhere.
    let (name, value) = match version {
        Version::V1_0 => ("[a-z\\\\é]{1,9}", "([!-~é]([ -~]{0,9}[!-~])?)?"),
        // The same for CR in 1.1, where it would end a line after all.
        Version::V1_1 => ("[a-z\\\\:\n é]{1,9}", "[a-z\\\\:\n é]{0,20}"),
        Version::V1_2 => ("[a-z\\\\:\n\r é]{1,9}", "[a-z\\\\:\n\r é]{0,20}"),
    };
    let commands: Vec<Command> = Command::ALL
        .iter()
        .copied()
        .filter(|c| !c.is_unescaped())
        .collect();
    let headers = proptest::collection::vec((name, value), 0..8);
    let body = proptest::collection::vec(any::<u8>(), 0..50);
    (proptest::sample::select(commands), headers, body).prop_map(|(command, headers, body)| Frame {
        command,
        headers: headers
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect(),
        body,
    })
}

/// Without what `encode` adds.
fn bare(frame: &Frame) -> Frame {
    let headers: Headers = frame
        .headers
        .iter()
        .filter(|(name, _)| *name != "content-length")
        .collect();
    Frame {
        headers,
        ..frame.clone()
    }
}

fn any_version() -> impl Strategy<Value = Version> {
    proptest::sample::select(Version::ALL.to_vec())
}

proptest! {
    #[test]
    fn what_is_written_is_read_back_in_whatever_pieces(
        (version, all) in any_version().prop_flat_map(|version| {
            (Just(version), proptest::collection::vec(any_frame(version), 1..4))
        }),
        size in 1usize..40,
    ) {
        let mut bytes = Vec::new();
        for frame in &all {
            frame.encode(version, &mut bytes);
        }
        let (read, error) = frames(version, FrameLimits::default(), bytes.chunks(size));
        prop_assert_eq!(error, None);
        prop_assert_eq!(read.iter().map(bare).collect::<Vec<_>>(), all.iter().map(bare).collect::<Vec<_>>());
    }

    #[test]
    fn pieces_change_nothing(
        version in any_version(),
        bytes in "(SEND|ACK|DISCONNECT|CONNECT|X)?[\r]?\n([a-c\\\\:]{0,4}(content-length:[0-9])?[\r]?\n){0,4}[a\0\n]{0,9}",
        at in any::<proptest::sample::Index>(),
    ) {
        let bytes = bytes.as_bytes();
        let at_once = frames(version, FrameLimits::default(), [bytes]);
        let (before, after) = bytes.split_at(at.index(bytes.len() + 1));
        // How much of a line an error quotes may differ, not whether and when there is one.
        let seen = |(frames, error): (Vec<Frame>, Option<Malformed>)| (frames, error.map(|e| e.code()));
        let at_once = seen(at_once);
        prop_assert_eq!(&seen(frames(version, FrameLimits::default(), [before, after])), &at_once);
        prop_assert_eq!(&seen(frames(version, FrameLimits::default(), bytes.chunks(1))), &at_once);
    }
}
