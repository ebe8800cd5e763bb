// Package zoo fills a directory with every kind of file a Linux root can hold,
// for tests that a capture brings each back exactly. It needs root.
//
// Each kind has a directory of its own, named for it. What a filesystem cannot
// hold is skipped by name, and only that.
package zoo

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Far is the top-level directory of kinds that rsync, getfacl and getcap cannot
// handle: paths over PATH_MAX, a file of 1 TiB.
const Far = "far"

// Kind is one kind of file.
type Kind struct {
	Name string
	// Far kinds are made below the directory [Far].
	Far bool
	// Not are the filesystem types that cannot hold it.
	Not  []string
	make func(*maker)
}

// Kinds returns all kinds, in the order they are made.
func Kinds() []Kind {
	return slices.Concat(contentKinds(), linkKinds(), nodeKinds(), nameKinds(), metadataKinds(), directoryKinds())
}

// Create makes the zoo below dir, which is on a filesystem of the given type,
// and returns the names of the kinds made and of those skipped.
func Create(dir, fstype string) (made, skipped []string, err error) {
	if err := os.Mkdir(filepath.Join(dir, Far), 0o755); err != nil {
		return nil, nil, err
	}
	for _, k := range Kinds() {
		if slices.Contains(k.Not, fstype) {
			skipped = append(skipped, k.Name)
			continue
		}
		parent := dir
		if k.Far {
			parent = filepath.Join(dir, Far)
		}
		m := &maker{root: filepath.Join(parent, k.Name), rand: rand.NewChaCha8([32]byte{1})}
		m.check("mkdir", os.Mkdir(m.root, 0o755))
		if m.err == nil {
			k.make(m)
		}
		if m.err != nil {
			return nil, nil, fmt.Errorf("kind %s on %s: %w", k.Name, fstype, m.err)
		}
		made = append(made, k.Name)
	}
	return made, skipped, root(dir)
}

// root gives the hierarchy's own directory something to lose.
func root(dir string) error {
	m := &maker{root: dir}
	m.xattr(".", "user.root", "of the zoo")
	m.acl("u:1234:rx", ".")
	m.mode(".", 0o1751)
	m.owner(".", 12, 34)
	m.mtime(".", 1234567890, 987654321)
	return m.err
}

// Release undoes what would keep a zoo from being removed: immutable and
// append-only flags.
func Release(dir string) error {
	if out, err := exec.Command("chattr", "-R", "-f", "-ia", filepath.Join(dir, "flags")).CombinedOutput(); err != nil {
		return fmt.Errorf("chattr: %w\n%s", err, out)
	}
	return nil
}

// maker makes files of one kind; its first error stays.
type maker struct {
	root string
	rand *rand.ChaCha8
	err  error
}

func (m *maker) check(what string, err error) {
	if err != nil && m.err == nil {
		m.err = fmt.Errorf("%s: %w", what, err)
	}
}

// path does not clean name: a name's bytes are the point.
func (m *maker) path(name string) string { return m.root + "/" + name }

func (m *maker) dir(names ...string) {
	for _, n := range names {
		m.check("mkdir", os.Mkdir(m.path(n), 0o755))
	}
}

func (m *maker) file(name, content string) {
	m.check("write", os.WriteFile(m.path(name), []byte(content), 0o644))
}

// bytes are n bytes that do not compress and are the same in every zoo.
func (m *maker) bytes(n int) string {
	b := make([]byte, n)
	_, err := m.rand.Read(b)
	m.check("rand", err)
	return string(b)
}

// piece is data at an offset of a file with holes.
type piece struct {
	off  int64
	data string
}

// sparse makes a file of size bytes that has only the given pieces.
func (m *maker) sparse(name string, size int64, pieces ...piece) {
	f, err := os.Create(m.path(name))
	m.check("create", err)
	if err != nil {
		return
	}
	for _, p := range pieces {
		_, err := f.WriteAt([]byte(p.data), p.off)
		m.check("write", err)
	}
	m.check("truncate", f.Truncate(size))
	m.check("close", f.Close())
}

func (m *maker) fallocate(name string, mode uint32, off, n int64) {
	f, err := os.OpenFile(m.path(name), os.O_RDWR|os.O_CREATE, 0o644)
	m.check("open", err)
	if err != nil {
		return
	}
	m.check("fallocate", unix.Fallocate(int(f.Fd()), mode, off, n))
	m.check("close", f.Close())
}

func (m *maker) symlink(target, name string) {
	m.check("symlink", os.Symlink(target, m.path(name)))
}

func (m *maker) link(old, name string) {
	m.check("link", unix.Linkat(unix.AT_FDCWD, m.path(old), unix.AT_FDCWD, m.path(name), 0))
}

func (m *maker) node(name string, mode uint32, major, minor uint32) {
	m.check("mknod", unix.Mknod(m.path(name), mode, int(unix.Mkdev(major, minor))))
}

func (m *maker) mode(name string, mode uint32) {
	m.check("chmod", unix.Chmod(m.path(name), mode))
}

func (m *maker) owner(name string, uid, gid uint32) {
	m.check("lchown", unix.Lchown(m.path(name), int(uid), int(gid)))
}

func (m *maker) xattr(name, attr, value string) {
	m.check(attr, unix.Lsetxattr(m.path(name), attr, []byte(value), 0))
}

// mtime is set last: whatever else changes a file may change it too.
func (m *maker) mtime(name string, sec, nsec int64) {
	ts := []unix.Timespec{{Sec: sec, Nsec: nsec}, {Sec: sec, Nsec: nsec}}
	m.check("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, m.path(name), ts, unix.AT_SYMLINK_NOFOLLOW))
}

func (m *maker) acl(spec string, names ...string) {
	m.tool("setfacl", append([]string{"-m", spec, "--"}, names...)...)
}

func (m *maker) tool(name string, args ...string) {
	cmd := exec.Command(name, args...)
	cmd.Dir = m.root
	if out, err := cmd.CombinedOutput(); err != nil {
		m.check(name+" "+strings.Join(args, " "), fmt.Errorf("%w: %s", err, out))
	}
}
