package rootfs

import (
	"errors"
	"fmt"
	"io"
	"path"

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
func (w *walker) addVirtual(dir int, name, rel string, v *virtual, st *unix.Statx_t, exists bool) error {
	a := filetree.Attr{Mode: v.mode, Mtime: w.b.Peek().Attr(filetree.Root).Mtime, Major: v.major, Minor: v.minor}
	if exists && uint32(st.Mode)&unix.S_IFMT == a.Type() {
		old := attr(st)
		a.Mode, a.UID, a.GID, a.Mtime = old.Mode, old.UID, old.GID, old.Mtime
	}
	e := filetree.Entry{Name: name, Link: filetree.None, Attr: a, Target: v.target}
	if exists && dir >= 0 && a.Type() == unix.S_IFREG {
		if err := w.inodes.unopened(&e, dir, st); err != nil {
			w.problem(rel, err)
		}
	}
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

// replaceFiles plans the files that the image has in place of the volume's.
func (w *walker) replaceFiles() error {
	o, r := w.o, w.root
	plan := fstabPlan{root: o.RootSpec, rootType: o.RootType, captured: func(target string) bool {
		m := w.mounts.byPath[target]
		return m != nil && m.use && m != w.mounts.root
	}}
	if plan.rootType == "" {
		plan.rootType = "ext4"
	}
	if plan.root == "" && r.Facts.MountPoint {
		plan.root, plan.label = r.Facts.SpecUUID(), r.Facts.Label
	}
	old, err := w.readFile("etc/fstab")
	if err != nil {
		w.problem("etc/fstab", err)
	}
	w.filter.addSwaps(swapFiles(string(old)))
	switch {
	case o.Fstab != nil:
		w.replace("etc/fstab", o.Fstab)
	case o.FstabKind == FstabModern, o.FstabKind == FstabLegacy:
		w.replace("etc/fstab", []byte(generateFstab(o.FstabKind, plan)))
	case o.FstabKind != FstabKeep:
		return fmt.Errorf("unknown kind of fstab %q", o.FstabKind)
	default:
		text, changes := rewriteFstab(string(old), plan)
		if r.Fstab = changes; len(changes) > 0 {
			w.replace("etc/fstab", []byte(text))
		}
		old = nil
	}
	if old != nil {
		w.replace("etc/fstab.old", old)
	}
	crypt, err := w.readFile("etc/crypttab")
	if err != nil {
		w.problem("etc/crypttab", err)
	}
	if text, changes := rewriteCrypttab(string(crypt)); len(changes) > 0 {
		r.Fstab = append(r.Fstab, changes...)
		w.replace("etc/crypttab", []byte(text))
	}
	if o.GrubConfig != nil {
		w.directories("boot/grub")
		w.replace("boot/grub/menu.lst", o.GrubConfig)
		w.extra["boot/grub"]["grub.conf"] = &virtual{mode: unix.S_IFLNK | 0o777, target: "menu.lst"}
	}
	return nil
}

// replace puts a file into the image; its directory has to exist there.
func (w *walker) replace(rel string, content []byte) {
	dir, name := path.Split(rel)
	dir = path.Clean(dir)
	if w.extra[dir] == nil {
		w.extra[dir] = map[string]*virtual{}
	}
	w.extra[dir][name] = &virtual{mode: unix.S_IFREG | 0o644, content: content}
}

// directories puts a directory and those above it into the image, where the
// volume does not have them.
func (w *walker) directories(rel string) {
	for at := rel; at != "."; at = path.Dir(at) {
		dir := path.Dir(at)
		if w.extra[dir] == nil {
			w.extra[dir] = map[string]*virtual{}
		}
		w.extra[dir][path.Base(at)] = &virtual{mode: unix.S_IFDIR | 0o755, absent: true}
	}
	w.extra[rel] = map[string]*virtual{}
}

// maxConfig bounds the configuration files that are read into memory.
const maxConfig = 1 << 20

// readFile reads a small file of the volume; nil if there is none.
func (w *walker) readFile(rel string) ([]byte, error) {
	dir, err := openPath(w.root.fd, path.Dir(rel))
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	var st unix.Statx_t
	if err := statAt(dir, path.Base(rel), &st); errors.Is(err, unix.ENOENT) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	a := attr(&st)
	if a.Type() != unix.S_IFREG || a.Size > maxConfig {
		return nil, fmt.Errorf("is left as it is: not a regular file of at most %d bytes", maxConfig)
	}
	fd, err := openRegular(dir, path.Base(rel), &a, func(int, *unix.Statx_t) bool { return false })
	if err != nil {
		return nil, err
	}
	f := &liveFile{fd: fd}
	defer f.Close()
	return io.ReadAll(io.NewSectionReader(f, 0, maxConfig))
}
