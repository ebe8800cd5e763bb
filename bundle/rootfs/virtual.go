package rootfs

import (
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// virtual is something that stands in the image whatever the volume has in
// its place.
type virtual struct {
	mode         uint32 // type and permissions; those of the volume's file win if it has the same type
	target       string // of a symbolic link
	content      []byte // of a regular file
	major, minor uint32
	absent       bool // only where the volume has nothing of that name
}

// addVirtual adds v under a name; st is what the volume has there, if anything.
func (w *walker) addVirtual(t task, name, rel string, v *virtual, st *unix.Statx_t, exists bool) error {
	a := filetree.Attr{Mode: v.mode, Mtime: w.b.Peek().Attr(filetree.Root).Mtime, Major: v.major, Minor: v.minor}
	if exists && uint32(st.Mode)&unix.S_IFMT == a.Type() {
		old := attr(st)
		a.Mode, a.UID, a.GID, a.Mtime = old.Mode, old.UID, old.GID, old.Mtime
	}
	e := filetree.Entry{Name: name, Link: filetree.None, Attr: a, Target: v.target}
	e.Size = int64(len(v.content))
	id, err := w.b.Add(&e)
	if err != nil {
		return err
	}
	switch e.Type() {
	case unix.S_IFREG:
		w.root.virtual[id] = v.content
		w.root.Seen.Bytes += e.Size
	case unix.S_IFDIR:
		w.todo = append(w.todo, task{id: id})
	}
	return nil
}

// classicNodes are the devices without which a system does not come up before
// it has mounted a /dev of its own, and the links programs expect beside them.
func classicNodes() map[string]*virtual {
	char := func(mode, major, minor uint32) *virtual {
		return &virtual{mode: unix.S_IFCHR | mode, major: major, minor: minor}
	}
	link := func(target string) *virtual { return &virtual{mode: unix.S_IFLNK | 0o777, target: target} }
	return map[string]*virtual{
		"console": char(0o600, 5, 1), "full": char(0o666, 1, 7), "null": char(0o666, 1, 3), "ptmx": char(0o666, 5, 2),
		"random": char(0o666, 1, 8), "tty": char(0o666, 5, 0), "urandom": char(0o666, 1, 9), "zero": char(0o666, 1, 5),
		"fd": link("/proc/self/fd"), "stdin": link("fd/0"), "stdout": link("fd/1"), "stderr": link("fd/2"),
	}
}

// skeleton are the directories that every system needs as mount points.
func skeleton() map[string]*virtual {
	vs := map[string]*virtual{}
	for _, dir := range []string{"dev", "proc", "sys", "run", "mnt", "tmp"} {
		vs[dir] = &virtual{mode: mountPointMode(unix.S_IFDIR, dir), absent: true}
	}
	return vs
}
