//! What is valid and what is not, case by case, with what users are told.

use xbee_jsdl::verdict;

const NAMESPACES: &str = "xmlns:j=\"http://schemas.ggf.org/jsdl/2005/11/jsdl\" \
     xmlns:p=\"http://schemas.ggf.org/jsdl/2005/11/jsdl-posix\" \
     xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\" \
     xmlns:xsd=\"http://www.w3.org/2001/XMLSchema\" xmlns:f=\"urn:foreign\"";

/// A job whose description holds `body`, on the document's second line.
fn job(body: &str) -> String {
    format!(
        "<j:JobDefinition {NAMESPACES}><j:JobDescription>\n{body}\n</j:JobDescription>\
         </j:JobDefinition>"
    )
}

fn posix(body: &str) -> String {
    job(&format!(
        "<j:Application><p:POSIXApplication>{body}</p:POSIXApplication></j:Application>"
    ))
}

fn resources(body: &str) -> String {
    job(&format!("<j:Resources>{body}</j:Resources>"))
}

fn staging(body: &str) -> String {
    job(&format!("<j:DataStaging>{body}</j:DataStaging>"))
}

/// The codes of all findings, in order.
fn codes(document: impl AsRef<[u8]>) -> Vec<&'static str> {
    match verdict(document.as_ref()) {
        Ok(()) => Vec::new(),
        Err(findings) => findings.iter().map(|finding| finding.code).collect(),
    }
}

#[track_caller]
fn check(cases: &[(String, &[&str])]) {
    for (document, expected) in cases {
        assert_eq!(
            codes(document),
            *expected,
            "{document}\n{:?}",
            verdict(document.as_bytes())
        );
    }
}

#[test]
fn content_models() {
    check(&[
        (job(""), &[]),
        (
            job("<j:JobIdentification/><j:Application/><j:Resources/>"),
            &[],
        ),
        (
            job("<j:Application/><j:JobIdentification/>"),
            &["unexpected-element"],
        ),
        (
            job("<j:Application/><j:Application/>"),
            &["unexpected-element"],
        ),
        (job("<j:Bogus/>"), &["unexpected-element"]),
        (job("text"), &["unexpected-text"]),
        (job("&#160;"), &["unexpected-text"]),
        (job("<![CDATA[ ]]><!-- c --><?pi?>"), &[]),
        (staging("<j:FileName>a</j:FileName>"), &["missing-element"]),
        (
            staging("<j:CreationFlag>append</j:CreationFlag>"),
            &["unexpected-element"],
        ),
        (resources("<j:CandidateHosts/>"), &["missing-element"]),
        (
            resources("<j:CandidateHosts><j:HostName/><j:HostName/></j:CandidateHosts>"),
            &[],
        ),
        (
            resources(
                "<j:TotalCPUCount><j:Range><j:LowerBound>1</j:LowerBound></j:Range></j:TotalCPUCount>",
            ),
            &["missing-element"],
        ),
        (posix("<p:Argument/><p:Argument/><p:Output/>"), &[]),
        (
            posix("<p:Argument/><p:Executable/>"),
            &["unexpected-element"],
        ),
        (posix("<p:Executable/><f:x/>"), &["unexpected-element"]),
        // Two mistakes in two places are both told.
        (
            job("<j:JobIdentification>x</j:JobIdentification><j:Resources>y</j:Resources>"),
            &["unexpected-text", "unexpected-text"],
        ),
    ]);
}

#[test]
fn foreign_elements() {
    check(&[
        (job("<f:x a='1'>text<f:y/></f:x>"), &[]),
        (job("<x/>"), &["unexpected-element"]),
        (job("<f:x><y/></f:x>"), &[]),
        (job("<p:WallTimeLimit>1</p:WallTimeLimit>"), &[]),
        // Declared elements are held to their declarations wherever they stand.
        (
            job("<f:x><p:WallTimeLimit>a</p:WallTimeLimit></f:x>"),
            &["invalid-value"],
        ),
        (job("<f:x><j:Bogus/></f:x>"), &[]),
        // A repeated element and the wildcard behind it mix, as they do for libxml2.
        (
            job(
                "<f:x/><j:DataStaging><j:FileName/><j:CreationFlag>append</j:CreationFlag></j:DataStaging><f:x/>",
            ),
            &[],
        ),
        (job("<f:x/><j:Resources/>"), &["unexpected-element"]),
    ]);
}

#[test]
fn attributes() {
    let root = |attributes: &str| {
        format!("<j:JobDefinition {NAMESPACES} {attributes}><j:JobDescription/></j:JobDefinition>")
    };
    check(&[
        (root("id='a'"), &[]),
        (root("id=' a '"), &[]),
        (root("id='1'"), &["invalid-attribute"]),
        (root("xml:lang='en' f:x='1'"), &[]),
        (root("name='a'"), &["unexpected-attribute"]),
        (root("j:id='a'"), &["unexpected-attribute"]),
        (root("p:id='a'"), &[]),
        (
            root("xsi:schemaLocation='urn:a b.xsd' xsi:noNamespaceSchemaLocation='c'"),
            &[],
        ),
        (root("xsi:nil='false'"), &["invalid-attribute"]),
        (resources("<j:FileSystem/>"), &["missing-attribute"]),
        (
            resources("<j:FileSystem name='a:b'/>"),
            &["invalid-attribute"],
        ),
        (
            resources("<j:CandidateHosts f:x='1'><j:HostName/></j:CandidateHosts>"),
            &["unexpected-attribute"],
        ),
        (
            job("<j:JobIdentification><j:JobName xml:lang='en'/></j:JobIdentification>"),
            &["unexpected-attribute"],
        ),
        (posix("<p:Executable id='1'/>"), &["unexpected-attribute"]),
        (
            resources("<j:TotalCPUCount><j:Exact epsilon='x'>1</j:Exact></j:TotalCPUCount>"),
            &["invalid-attribute"],
        ),
        (
            job(
                "<f:x><j:JobDefinition id='a'><j:JobDescription/></j:JobDefinition>\
                 <j:JobDefinition id='a'><j:JobDescription/></j:JobDefinition></f:x>",
            ),
            &["invalid-attribute"],
        ),
        (
            job(
                "<f:x xml:id='a'/><f:x><j:JobDefinition id='a'><j:JobDescription/></j:JobDefinition></f:x>",
            ),
            &["invalid-attribute"],
        ),
        (
            job("<f:x xml:id='a'/><f:x xml:id='a'/>"),
            &["not-well-formed"],
        ),
    ]);
}

#[test]
fn types_given_by_the_document() {
    let named = |name: &str| {
        job(&format!(
            "<j:JobIdentification><j:JobName xsi:type='{name}'>1</j:JobName></j:JobIdentification>"
        ))
    };
    check(&[
        (named("xsd:string"), &[]),
        (named("xsd:token"), &[]),
        (named("p:FileName_Type"), &[]),
        (named("xsd:int"), &["invalid-type"]),
        (named("j:Application_Type"), &["invalid-type"]),
        (named("j:Nope"), &["invalid-type"]),
        (named("nope:x"), &["invalid-type"]),
        (named(" xsd:string"), &["invalid-type"]),
        (job("<f:x xsi:type='xsd:int'>5</f:x>"), &[]),
        (
            job("<f:x xsi:type='xsd:int'>five</f:x>"),
            &["invalid-value"],
        ),
        (
            job("<f:x xsi:type='xsd:date'>2023-02-29</f:x>"),
            &["invalid-value"],
        ),
        (job("<f:x xsi:type='j:Range_Type'/>"), &["missing-element"]),
    ]);
}

/// Values of one element each: those that are valid, and those that are not.
#[test]
fn values() {
    type Values = (
        fn(&str) -> String,
        &'static [&'static str],
        &'static [&'static str],
    );
    let tables: [Values; 6] = [
        (
            |v| posix(&format!("<p:WallTimeLimit>{v}</p:WallTimeLimit>")),
            &["0", " 1\n", "+1", "-0", "007", "99999999999999999999999999"],
            &["", "-1", "1.0", "1 2", "x", "1e3", "--1"],
        ),
        (
            |v| {
                resources(&format!(
                    "<j:TotalCPUCount><j:Exact>{v}</j:Exact></j:TotalCPUCount>"
                ))
            },
            &[
                "1", "-1.5", ".5", "5.", "1e5", "1E-5", "INF", "-INF", "NaN", " 1 ", "1e",
            ],
            &["", "+INF", "inf", "1,5", "0x1", ".", "NaN ", "--1", "1 2"],
        ),
        (
            |v| resources(&format!("<j:ExclusiveExecution>{v}</j:ExclusiveExecution>")),
            &["true", "false", "1", "0", "\ttrue "],
            &["", "TRUE", "yes", "2"],
        ),
        (
            |v| {
                staging(&format!(
                    "<j:FileName/><j:CreationFlag>{v}</j:CreationFlag>"
                ))
            },
            &[
                "overwrite",
                "append",
                "dontOverwrite",
                "over<!-- -->write",
                "<![CDATA[append]]>",
            ],
            &["", "Overwrite", " overwrite", "overwrite\n"],
        ),
        (
            |v| {
                staging(&format!(
                    "<j:FileName/><j:FilesystemName>{v}</j:FilesystemName>\
                     <j:CreationFlag>append</j:CreationFlag>"
                ))
            },
            &["HOME", " a-b.c_1 ", "é"],
            &["", "1a", "a b", "a:b", "-a"],
        ),
        (
            |v| job(&format!("<f:x><j:URI>{v}</j:URI></f:x>")),
            &[
                "",
                "http://a:80/b?c=d#e",
                " file:///a b ",
                "C:\\x",
                "${X}/y",
                "%41",
                "a#[b]",
                "http://[::1]:1/",
                "//u@h",
                "mailto:a@b",
                "rns:/x",
                "../a",
            ],
            &[
                "http://a:PORT/",
                "http://a:/",
                "%zz",
                "a#b#c",
                "1a:b",
                "://",
                "a[b]",
                "http://[::1",
                "http://u@v@h/",
                "http://a:99999999999/",
            ],
        ),
    ];
    for (document, valid, invalid) in tables {
        for value in valid {
            assert_eq!(codes(document(value)), [""; 0], "{value:?}");
        }
        for value in invalid {
            assert_eq!(codes(document(value)), ["invalid-value"], "{value:?}");
        }
    }
}

#[test]
fn roots() {
    check(&[
        (format!("<j:URI {NAMESPACES}>a</j:URI>"), &[]),
        (format!("<p:POSIXApplication {NAMESPACES}/>"), &[]),
        (format!("<f:x {NAMESPACES}/>"), &["unknown-document"]),
        ("<JobDefinition/>".to_owned(), &["unknown-document"]),
    ]);
}

#[test]
fn well_formedness() {
    let ill_formed = [
        "",
        " ",
        "x",
        "<",
        "<a",
        "<a>",
        "</a>",
        "<a></b>",
        "<a/><b/>",
        "<a/>x",
        "<a/>&amp;",
        "<![CDATA[]]><a/>",
        "<a b='1' b='2'/>",
        "<a b='1'c='2'/>",
        "<a b=1/>",
        "<a b/>",
        "<a b='<'/>",
        "<a b='&'/>",
        "<a b='&x;'/>",
        "<a>&x;</a>",
        "<a>& </a>",
        "<a>]]></a>",
        "<a>&#0;</a>",
        "<a>&#xD800;</a>",
        "<a>&#X41;</a>",
        "<a>\u{1}</a>",
        "<a>\u{FFFE}</a>",
        "< a/>",
        "<1/>",
        "<a><!-- -- --></a>",
        "<a><!-- ---></a>",
        "<a><?xml?></a>",
        "<a><?1?></a>",
        "<a><?b:c?></a>",
        " <?xml version='1.0'?><a/>",
        "<?xml encoding='UTF-8'?><a/>",
        "<?xml version='2.0'?><a/>",
        "<?xml version='1.0' standalone='yes' encoding='UTF-8'?><a/>",
        "<!DOCTYPE a><!DOCTYPE a><a/>",
        "<a/><!DOCTYPE a>",
        "<a:b:c xmlns:a='u:u'/>",
        "<a:b/ >",
        "<a xmlns:b=''/>",
        "<a xmlns:='u:u'/>",
        "<a xmlns='http://a b'/>",
        "<a xmlns:xml='u:u'/>",
        "<a xmlns:xmlns='u:u'/>",
        "<a xmlns:b='u:u' xmlns:c='u:u' b:d='' c:d=''/>",
        "<a xml:id='1'/>",
    ];
    for document in ill_formed {
        assert_eq!(codes(document), ["not-well-formed"], "{document:?}");
    }
    assert_eq!(codes("<a:b/>"), ["undeclared-prefix"]);
    assert_eq!(codes("<a b:c=''/>"), ["undeclared-prefix"]);

    let valid = job("<f:x b = \"'&lt;&#x41;\"\n>]]&gt;>&#13;</f:x >");
    for before in [
        "",
        "\n",
        "<?xml version='1.0'?>",
        "<?xml version='1.1' encoding='UTF-8' standalone='no' ?>\n",
        "<!-- - --><?a?><?xml-b c?>",
        "<!DOCTYPE j:JobDefinition SYSTEM 'x.dtd' []>",
    ] {
        assert_eq!(codes(format!("{before}{valid}")), [""; 0], "{before:?}");
    }
}

#[test]
fn encodings() {
    let text = job("<f:x>Grüße €</f:x>");
    let utf16 = |unit: fn(u16) -> [u8; 2], mark: bool, declaration: &str| -> Vec<u8> {
        let text = format!("{}{declaration}{text}", if mark { "\u{FEFF}" } else { "" });
        text.encode_utf16().flat_map(unit).collect()
    };
    let declared = "<?xml version='1.0' encoding='UTF-16'?>";
    let latin = |label: &str| -> Vec<u8> {
        let text = job("<f:x>Grüße</f:x>");
        format!("<?xml version='1.0' encoding='{label}'?>{text}")
            .chars()
            .map(|c| u8::try_from(u32::from(c)).expect("Latin 1"))
            .collect()
    };
    let valid: [Vec<u8>; 9] = [
        text.clone().into_bytes(),
        format!("\u{FEFF}{text}").into_bytes(),
        utf16(u16::to_le_bytes, true, ""),
        utf16(u16::to_be_bytes, true, declared),
        utf16(u16::to_le_bytes, false, declared),
        utf16(u16::to_be_bytes, false, declared),
        latin("ISO-8859-1"),
        latin("windows-1252"),
        latin("iso-8859-15"),
    ];
    for document in valid {
        assert_eq!(
            codes(&document),
            [""; 0],
            "{}",
            String::from_utf8_lossy(&document)
        );
    }
    assert_eq!(codes(latin("UTF-8")), ["not-well-formed"]);
    assert_eq!(codes(latin("US-ASCII")), ["not-well-formed"]);
    assert_eq!(codes(latin("UTF-16")), ["not-well-formed"]);
    assert_eq!(codes(latin("klingon")), ["unknown-encoding"]);
    assert_eq!(codes(b"\xFF\xFE<\0x"), ["not-well-formed"]);
}

/// The words themselves, as a user meets them.
#[test]
fn messages() {
    let message = |document: &str| {
        let findings = verdict(document.as_bytes()).expect_err(document);
        findings[0].to_string()
    };
    let cases = [
        (
            "<j:JobDefinition xmlns:j=\"urn:x\">\n</j:JobDescription>".to_owned(),
            "2: not well-formed: ill-formed document: expected `</j:JobDefinition>`, but \
             `</j:JobDescription>` was found",
        ),
        (
            "<j:JobDefinition xmlns:j=\"urn:x\">".to_owned(),
            "1: element {urn:x}JobDefinition is not closed, expected </JobDefinition> before the \
             end of the document",
        ),
        (
            "\n<jsdl:JobDefinition/>".to_owned(),
            "2: the namespace prefix of 'jsdl:JobDefinition' is not declared, expected \
             xmlns:jsdl=\"http://schemas.ggf.org/jsdl/2005/11/jsdl\"",
        ),
        (
            "<html/>".to_owned(),
            "1: element html is not known, expected jsdl:JobDefinition with \
             xmlns:jsdl=\"http://schemas.ggf.org/jsdl/2005/11/jsdl\"",
        ),
        (
            job("<j:Resource/>"),
            "2: element jsdl:Resource is not expected here in jsdl:JobDescription, expected \
             jsdl:JobIdentification, jsdl:Application, jsdl:Resources, jsdl:DataStaging or an \
             element of another namespace",
        ),
        (
            staging("<j:FileName>a</j:FileName>"),
            "2: element jsdl:DataStaging is incomplete, expected jsdl:CreationFlag in it",
        ),
        (
            posix("<p:WallTimeLimit>soon</p:WallTimeLimit>"),
            "2: 'soon' is not a value of jsdl-posix:WallTimeLimit, expected a whole number, 0 or \
             more",
        ),
        (
            staging("<j:FileName>a</j:FileName><j:CreationFlag>overwrite\n</j:CreationFlag>"),
            "2: 'overwrite' is not a value of jsdl:CreationFlag, expected 'overwrite' without white \
             space",
        ),
        (
            posix("<p:Executable id='1'/>"),
            "2: attribute id is not allowed in jsdl-posix:Executable, expected filesystemName",
        ),
        (
            job("<f:x>&nbsp;</f:x>"),
            "2: the entity 'nbsp' is not defined, expected lt, gt, amp, quot, apos or a character \
             number",
        ),
        (
            "<!DOCTYPE a [<!ENTITY b 'c'>]><a/>".to_owned(),
            "1: the document declares entities, expected none: they are not expanded",
        ),
    ];
    for (document, expected) in cases {
        assert_eq!(message(&document), expected);
    }
}

#[test]
fn places_are_counted_in_lines_and_characters() {
    let document = job("<j:Application/>\r\n<!-- é\n-->\t<j:Bogus/>");
    let findings = verdict(document.as_bytes()).expect_err("invalid");
    assert_eq!((findings[0].line, findings[0].column), (4, 5));
}
