//! A task's state as an activity's status.

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};
use xbee_api::{State, TaskStatus};

use crate::{BES, TaskState, XBE};

/// `bes:ActivityStatus` (GFD.108, section 5.1) with XenBEE's sub-state and, as `xbe:MetaData`, what else is known: the time
/// of each transition, exit code, address, why it ended.
pub fn activity_status(task: &TaskStatus) -> String {
    let mut writer = Writer::new_with_indent(vec![], b' ', 2);
    // Fails only where the place that is written to does, which is memory.
    let written = write(&mut writer, task);
    debug_assert!(written.is_ok());
    String::from_utf8_lossy(&writer.into_inner()).into_owned() + "\n"
}

type Xml = Writer<Vec<u8>>;

fn write(writer: &mut Xml, task: &TaskStatus) -> std::io::Result<()> {
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    writer
        .create_element("bes:ActivityStatus")
        .with_attribute(("xmlns:bes", BES))
        .with_attribute(("xmlns:xbe", XBE))
        .with_attribute(("state", state(task.state)))
        .write_inner_content(|writer| {
            if let Some(substate) = task.substate {
                writer
                    .create_element(format!("xbe:{}", substate.name()))
                    .write_empty()?;
            }
            writer
                .create_element("xbe:MetaData")
                .write_inner_content(|writer| meta_data(writer, task))?;
            Ok(())
        })?;
    Ok(())
}

fn meta_data(writer: &mut Xml, task: &TaskStatus) -> std::io::Result<()> {
    let mut leaf = |name: &str, text: &str| -> std::io::Result<()> {
        let element = writer.create_element(format!("xbe:{name}"));
        element.write_text_content(BytesText::new(&printable(text)))?;
        Ok(())
    };
    leaf("TaskID", &task.id.to_string())?;
    if let Some(name) = &task.name {
        leaf("Name", name)?;
    }
    if let Some(code) = task.exit_code {
        leaf("ExitCode", &code.to_string())?;
    }
    if let Some(address) = &task.address {
        leaf("Address", address)?;
    }
    if let Some(code) = &task.reason_code {
        leaf("ReasonCode", code)?;
    }
    if let Some(reason) = &task.reason {
        leaf("LogMessage", reason)?;
    }
    for transition in &task.times {
        let mut element = writer
            .create_element("xbe:Transition")
            .with_attribute(("state", state(transition.state)));
        if let Some(substate) = transition.substate {
            element = element.with_attribute(("substate", substate.name()));
        }
        element
            .with_attribute(("at", transition.at.as_str()))
            .write_empty()?;
    }
    Ok(())
}

impl From<&TaskStatus> for TaskState {
    fn from(task: &TaskStatus) -> TaskState {
        TaskState {
            task: task.id,
            state: state(task.state).to_owned(),
            substate: task.substate.map(|substate| substate.name().to_owned()),
            exit_code: task.exit_code,
            reason: task.reason.as_deref().map(printable),
        }
    }
}

/// BES says `Cancelled` where XenBEE says `Terminated`.
fn state(state: State) -> &'static str {
    match state {
        State::Terminated => "Cancelled",
        state => state.name(),
    }
}

/// Without what XML 1.0 (section 2.2) cannot hold, as a guest may have written it.
fn printable(text: &str) -> String {
    let allowed = |c: char| matches!(c, '\t' | '\n' | ' '..='\u{fffd}' | '\u{10000}'..);
    text.chars()
        .map(|c| if allowed(c) { c } else { '\u{fffd}' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use quick_xml::Reader;
    use xbee_api::{SubState, Transition};

    fn task() -> TaskStatus {
        let transition = |state, substate, second| Transition {
            state,
            substate,
            at: format!("2026-01-02T03:04:0{second}.000Z"),
            at_ms: 0,
        };
        TaskStatus {
            id: uuid::Uuid::from_u128(1),
            name: Some("a <b> & \"c\"".into()),
            owner: 0,
            state: State::Running,
            substate: Some(SubState::StageIn),
            exit_code: None,
            reason: Some("odd \u{1b}[2J\0".into()),
            reason_code: None,
            times: vec![
                transition(State::Pending, Some(SubState::Confirmed), 5),
                transition(State::Running, Some(SubState::StageIn), 6),
            ],
            progress: None,
            image: "base".into(),
            address: Some("fd00::3".into()),
            reservation: None,
            array: None,
            member: None,
            ports: vec![],
        }
    }

    #[test]
    fn the_state_is_as_bes_has_it_and_the_rest_is_beside() {
        let text = activity_status(&task());
        let expected = r#"<bes:ActivityStatus xmlns:bes="http://schemas.ggf.org/bes/2006/08/bes-factory" xmlns:xbe="http://www.xenbee.net/schema/2008/02/xbe" state="Running">
  <xbe:Stage-In/>
  <xbe:MetaData>
    <xbe:TaskID>00000000-0000-0000-0000-000000000001</xbe:TaskID>
    <xbe:Name>a &lt;b&gt; &amp; &quot;c&quot;</xbe:Name>
    <xbe:Address>fd00::3</xbe:Address>
    <xbe:LogMessage>odd �[2J�</xbe:LogMessage>
    <xbe:Transition state="Pending" substate="Confirmed" at="2026-01-02T03:04:05.000Z"/>
    <xbe:Transition state="Running" substate="Stage-In" at="2026-01-02T03:04:06.000Z"/>
  </xbe:MetaData>
</bes:ActivityStatus>
"#;
        assert_eq!(text.split_once('\n').unwrap().1, expected);
        let ended = TaskStatus {
            state: State::Terminated,
            substate: None,
            exit_code: Some(7),
            ..task()
        };
        let text = activity_status(&ended);
        assert!(text.contains(r#"state="Cancelled">"#), "{text}");
        assert!(text.contains("<xbe:ExitCode>7</xbe:ExitCode>"), "{text}");
    }

    #[test]
    fn it_is_well_formed_whatever_is_in_it() {
        let odd: String = (0..0x300).filter_map(char::from_u32).collect();
        let text = activity_status(&TaskStatus {
            name: Some(odd.clone()),
            reason: Some(odd),
            ..task()
        });
        let mut reader = Reader::from_str(&text);
        while reader.read_event().unwrap() != Event::Eof {}
    }
}
