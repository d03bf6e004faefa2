//! `schema/gen-1.cddl` says what the code says. After a change that old agents understand:
//! `XBEE_ACCEPT=1 cargo test -p xbee-protocol`. For any other there is a new generation.

#![allow(clippy::unwrap_used)]

use std::fmt::Write;

use syn::{Attribute, Fields, GenericArgument, Item, PathArguments, Type};

const HEAD: &str = "\
; XenBEE agent protocol, generation 1 (CDDL, RFC 8610). Made by tests/schema.rs from the code.
; A frame is the length of its body in four bytes, big endian, and the body: one guest-message or
; host-message in CBOR (RFC 8949). Trailing members that are null may be left out of an array.

";

#[test]
fn the_schema_is_that_of_the_code() {
    let mut schema = String::from(HEAD);
    for source in [
        include_str!("../src/message.rs"),
        include_str!("../src/boot.rs"),
    ] {
        for item in syn::parse_file(source).unwrap().items {
            describe(&item, &mut schema);
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/gen-1.cddl");
    if std::env::var_os("XBEE_ACCEPT").is_some() {
        std::fs::write(path, &schema).unwrap();
    }
    let checked_in = std::fs::read_to_string(path).unwrap();
    assert!(
        checked_in == schema,
        "{path} differs from the code; agents in old images speak what it says:\n{schema}"
    );
}

fn describe(item: &Item, out: &mut String) {
    match item {
        Item::Struct(item) if encodes(&item.attrs) => {
            write!(out, "{} = ", kebab(&item.ident.to_string())).unwrap();
            members(&item.fields, out, "");
            out.push_str("\n\n");
        }
        Item::Enum(item) if encodes(&item.attrs) => {
            let index_only = has(&item.attrs, "index_only");
            write!(out, "{} =", kebab(&item.ident.to_string())).unwrap();
            for (place, variant) in item.variants.iter().enumerate() {
                let separator = if place == 0 { " " } else { "/ " };
                let number = number(&variant.attrs);
                write!(out, "\n    {separator}").unwrap();
                if index_only {
                    write!(out, "{number}").unwrap();
                } else {
                    write!(out, "[{number}, ").unwrap();
                    members(&variant.fields, out, "    ");
                    out.push(']');
                }
                write!(out, " ; {}", kebab(&variant.ident.to_string())).unwrap();
            }
            out.push_str("\n\n");
        }
        _ => {}
    }
}

fn members(fields: &Fields, out: &mut String, indent: &str) {
    let mut sorted: Vec<_> = fields
        .iter()
        .map(|field| (number(&field.attrs), field))
        .collect();
    sorted.sort_by_key(|(number, _)| *number);
    let numbers: Vec<usize> = sorted.iter().map(|(number, _)| *number).collect();
    assert_eq!(
        numbers,
        (0..sorted.len()).collect::<Vec<_>>(),
        "numbers with gaps"
    );
    out.push('[');
    for (_, field) in &sorted {
        let name = field.ident.as_ref().map_or(String::new(), |name| {
            format!("{}: ", name.to_string().replace('_', "-"))
        });
        let as_bytes = has(&field.attrs, "minicbor::bytes");
        if sorted.len() > 1 {
            write!(out, "\n{indent}    ").unwrap();
        }
        write!(out, "{name}{}", kind(&field.ty, as_bytes)).unwrap();
        if sorted.len() > 1 {
            out.push(',');
        }
    }
    if sorted.len() > 1 {
        write!(out, "\n{indent}").unwrap();
    }
    out.push(']');
}

fn kind(ty: &Type, as_bytes: bool) -> String {
    match ty {
        Type::Array(array) if as_bytes => format!("bstr .size {}", length(&array.len)),
        Type::Path(path) => {
            let last = path.path.segments.last().unwrap();
            let inner = match &last.arguments {
                PathArguments::AngleBracketed(arguments) => match &arguments.args[0] {
                    GenericArgument::Type(inner) => Some(inner),
                    _ => None,
                },
                _ => None,
            };
            match (last.ident.to_string().as_str(), inner) {
                ("Vec", Some(_)) if as_bytes => "bstr".into(),
                ("Vec", Some(inner)) => format!("[* {}]", kind(inner, false)),
                ("Option", Some(inner)) => format!("{} / null", kind(inner, as_bytes)),
                ("String", None) => "tstr".into(),
                ("bool", None) => "bool".into(),
                ("u8", None) => "uint .size 1".into(),
                ("u16", None) => "uint .size 2".into(),
                ("u32", None) => "uint .size 4".into(),
                ("u64", None) => "uint .size 8".into(),
                ("i32", None) => "int .size 4".into(),
                ("i64", None) => "int .size 8".into(),
                ("Uuid", None) => "bstr .size 16".into(),
                ("Ipv6Addr", None) => "bstr .size 16".into(),
                ("Secret", None) => "bstr .size 32".into(),
                (name, None) => kebab(name),
                (name, Some(_)) => panic!("no schema for {name}<..>"),
            }
        }
        _ => panic!("no schema for this type"),
    }
}

/// A number, or the name of the one constant that lengths have.
fn length(expression: &syn::Expr) -> usize {
    match expression {
        syn::Expr::Lit(syn::ExprLit {
            lit: syn::Lit::Int(number),
            ..
        }) => number.base10_parse().unwrap(),
        _ => xbee_protocol::proof::BYTES,
    }
}

fn encodes(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|attribute| text(attribute).contains("Encode"))
}

fn has(attributes: &[Attribute], word: &str) -> bool {
    attributes
        .iter()
        .any(|attribute| text(attribute).contains(word))
}

/// The `n` of `#[n(1)]` or `#[cbor(n(1), ..)]`.
fn number(attributes: &[Attribute]) -> usize {
    let mut numbers = attributes.iter().filter_map(|attribute| {
        let text = text(attribute);
        let (_, rest) = text.split_once("n (").or_else(|| text.split_once("n("))?;
        rest.split(')').next()?.trim().parse().ok()
    });
    numbers.next_back().unwrap()
}

fn text(attribute: &Attribute) -> String {
    match &attribute.meta {
        syn::Meta::List(list) => {
            format!("{}({})", list.path.get_ident().unwrap(), list.tokens)
        }
        _ => String::new(),
    }
}

fn kebab(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.extend(c.to_lowercase());
    }
    out
}
