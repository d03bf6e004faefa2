//! A simulated guest's files: names and bytes in memory, as much as the guest has.

use std::collections::BTreeMap;

use xbee_protocol::{Failure, FileInfo, code};

use super::failure;

/// Symbolic links followed on the way to a file.
const LINKS_MAX: usize = 8;

#[derive(Debug, Clone)]
pub(super) enum Node {
    File(File),
    Directory,
    Link(String),
}

#[derive(Debug, Clone, Default)]
pub(super) struct File {
    pub(super) content: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified_unix_seconds: i64,
}

impl File {
    pub(super) fn info(&self) -> FileInfo {
        FileInfo {
            size: self.content.len() as u64,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            modified_unix_seconds: self.modified_unix_seconds,
            blake3: *blake3::hash(&self.content).as_bytes(),
        }
    }
}

/// All files, by absolute path. Directories exist where something says so or is in them.
#[derive(Debug)]
pub(super) struct Files {
    nodes: BTreeMap<String, Node>,
    room_bytes: u64,
}

impl Files {
    pub(super) fn new(room_bytes: u64) -> Self {
        Self {
            nodes: BTreeMap::new(),
            room_bytes,
        }
    }

    /// Looks for room before anything is sent.
    pub(super) fn check_room(&self, path: &str, size: u64) -> Result<(), Failure> {
        let used: u64 = self
            .nodes
            .values()
            .map(|node| match node {
                Node::File(file) => file.content.len() as u64,
                _ => 0,
            })
            .sum();
        let available = self.room_bytes.saturating_sub(used);
        if size <= available {
            return Ok(());
        }
        Err(failure(
            code::FILE_ERROR,
            format!("cannot write {path} in the guest: {size} bytes needed, {available} free"),
        ))
    }

    pub(super) fn put(&mut self, path: &str, node: Node) -> Result<(), Failure> {
        let fail = |why| Err(error("write", path, why));
        let path = normal(path);
        if path == "/" || (self.is_directory(&path) && !matches!(node, Node::Directory)) {
            return fail("Is a directory");
        }
        let above: Vec<_> = path
            .match_indices('/')
            .skip(1)
            .map(|(end, _)| &path[..end])
            .collect();
        if above
            .iter()
            .any(|above| matches!(self.nodes.get(*above), Some(Node::File(_))))
        {
            return fail("Not a directory");
        }
        if matches!(node, Node::Directory) && matches!(self.nodes.get(&path), Some(Node::File(_))) {
            return fail("File exists");
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    pub(super) fn get(&self, path: &str) -> Result<&File, Failure> {
        let mut wanted = normal(path);
        for _ in 0..LINKS_MAX {
            match self.nodes.get(&wanted) {
                Some(Node::File(file)) => return Ok(file),
                Some(Node::Link(target)) => {
                    let above = wanted.rsplit_once('/').map_or("", |(above, _)| above);
                    wanted = match target.starts_with('/') {
                        true => normal(target),
                        false => normal(&format!("{above}/{target}")),
                    };
                }
                _ if self.is_directory(&wanted) => {
                    return Err(failure(
                        code::FILE_ERROR,
                        format!("cannot read {path} in the guest: not a regular file"),
                    ));
                }
                _ => return Err(error("read", path, "No such file or directory")),
            }
        }
        Err(error("read", path, "Too many levels of symbolic links"))
    }

    pub(super) fn remove(&mut self, path: &str) {
        let path = normal(path);
        let inside = format!("{}/", path.trim_end_matches('/'));
        self.nodes
            .retain(|name, _| *name != path && !name.starts_with(&inside));
    }

    fn is_directory(&self, path: &str) -> bool {
        let inside = format!("{}/", path.trim_end_matches('/'));
        matches!(self.nodes.get(path), Some(Node::Directory))
            || self
                .nodes
                .range(inside.clone()..)
                .next()
                .is_some_and(|(name, _)| name.starts_with(&inside))
    }
}

fn error(what: &str, path: &str, why: &str) -> Failure {
    failure(
        code::FILE_ERROR,
        format!("cannot {what} {path} in the guest: {why}"),
    )
}

/// A path from the root without empty parts, `.` and `..`.
pub(super) fn normal(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> Node {
        Node::File(File {
            content: content.into(),
            ..File::default()
        })
    }

    #[test]
    fn files_directories_and_links() {
        let mut files = Files::new(100);
        files.put("/a/b", file("1")).unwrap();
        files.put("/a/link", Node::Link("b".into())).unwrap();
        files.put("/loop", Node::Link("/loop".into())).unwrap();
        assert_eq!(files.get("a/../a//./link").unwrap().content, b"1");
        let text = |result: Result<&File, Failure>| result.unwrap_err().message;
        assert_eq!(
            text(files.get("/loop")),
            "cannot read /loop in the guest: Too many levels of symbolic links"
        );
        assert_eq!(
            text(files.get("/a")),
            "cannot read /a in the guest: not a regular file"
        );
        assert_eq!(
            text(files.get("/x")),
            "cannot read /x in the guest: No such file or directory"
        );
        files.put("/a", file("")).unwrap_err();
        files.put("/a/b/c", file("")).unwrap_err();
        files.put("/a/b", Node::Directory).unwrap_err();
        files.put("/", file("")).unwrap_err();
        files.check_room("/x", 99).unwrap();
        assert_eq!(
            files.check_room("/x", 100).unwrap_err().message,
            "cannot write /x in the guest: 100 bytes needed, 99 free"
        );
        files.remove("/a");
        assert!(files.get("/a/b").is_err() && files.get("/a/link").is_err());
        files.put("/a", file("")).unwrap();
    }
}
