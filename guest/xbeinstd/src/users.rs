//! Users and groups of the guest: `/etc/passwd` and `/etc/group` of its root.

use xbee_protocol::{Failure, code};

use crate::failure::failure;
use crate::root::Root;

/// Larger files are cut, in bytes.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Who runs a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// Finds a user (name or number; root without one) and a group (the user's own without one).
pub(crate) fn identity(
    root: &Root,
    user: Option<&str>,
    group: Option<&str>,
) -> Result<Identity, Failure> {
    // Images without these files have numbers only.
    let passwd = root
        .read_text("/etc/passwd", MAX_FILE_BYTES)
        .unwrap_or_default();
    let groups = root
        .read_text("/etc/group", MAX_FILE_BYTES)
        .unwrap_or_default();
    let mut identity = find_user(&passwd, user.unwrap_or("0"))?;
    if let Some(group) = group {
        identity.gid = find_group(&groups, group)?;
    }
    identity.groups = groups_of(&groups, &identity);
    Ok(identity)
}

fn find_user(passwd: &str, user: &str) -> Result<Identity, Failure> {
    let number = user.parse::<u32>().ok();
    let by_number = passwd
        .lines()
        .filter_map(passwd_line)
        .find(|entry| Some(entry.uid) == number);
    if let Some(entry) = passwd
        .lines()
        .filter_map(passwd_line)
        .find(|entry| entry.name == user)
        .or(by_number)
    {
        return Ok(entry);
    }
    match number {
        Some(uid) => Ok(Identity {
            name: if uid == 0 { "root".into() } else { user.into() },
            uid,
            gid: uid,
            groups: vec![],
            home: "/".into(),
            shell: "/bin/sh".into(),
        }),
        None => Err(failure(
            code::UNKNOWN_USER,
            format!("user {user:?} is not in the guest's /etc/passwd"),
        )),
    }
}

fn passwd_line(line: &str) -> Option<Identity> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let _password = fields.next()?;
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let _comment = fields.next()?;
    let home = fields.next()?.to_owned();
    let shell = fields
        .next()
        .filter(|shell| !shell.is_empty())
        .unwrap_or("/bin/sh")
        .to_owned();
    Some(Identity {
        name,
        uid,
        gid,
        groups: vec![],
        home,
        shell,
    })
}

fn find_group(groups: &str, group: &str) -> Result<u32, Failure> {
    let named = groups
        .lines()
        .filter_map(group_line)
        .find(|(name, ..)| *name == group);
    match named.map(|(_, gid, _)| gid).or_else(|| group.parse().ok()) {
        Some(gid) => Ok(gid),
        None => Err(failure(
            code::UNKNOWN_USER,
            format!("group {group:?} is not in the guest's /etc/group"),
        )),
    }
}

fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let _password = fields.next()?;
    let gid = fields.next()?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

fn groups_of(groups: &str, identity: &Identity) -> Vec<u32> {
    let mut gids: Vec<u32> = groups
        .lines()
        .filter_map(group_line)
        .filter(|(_, _, members)| members.split(',').any(|member| member == identity.name))
        .map(|(_, gid, _)| gid)
        .chain([identity.gid])
        .collect();
    gids.sort_unstable();
    gids.dedup();
    gids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_and_groups() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let root = Root::open_at(dir.path().to_str().unwrap()).unwrap();
        assert_eq!(identity(&root, None, None).unwrap().uid, 0);
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/bash\nbad line\nwww:x:33:34::/srv:\n77:x:5:5::/five:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("etc/group"),
            "web:x:34:\nadm:x:4:syslog,www\nlog:x:9:www\n",
        )
        .unwrap();
        let www = identity(&root, Some("www"), None).unwrap();
        assert_eq!(
            (www.uid, www.gid, www.home.as_str(), www.shell.as_str()),
            (33, 34, "/srv", "/bin/sh")
        );
        assert_eq!(www.groups, [4, 9, 34]);
        assert_eq!(identity(&root, Some("33"), Some("adm")).unwrap().gid, 4);
        assert_eq!(
            identity(&root, Some("77"), None).unwrap().uid,
            5,
            "a name before a number"
        );
        assert_eq!(
            identity(&root, Some("4000"), Some("5000")).unwrap().gid,
            5000
        );
        assert_eq!(
            identity(&root, Some("nobody"), None).unwrap_err().code,
            code::UNKNOWN_USER
        );
        assert_eq!(
            identity(&root, None, Some("nogroup")).unwrap_err().code,
            code::UNKNOWN_USER
        );
    }
}
