package inject

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// testKey is a public key line made from a seed.
func testKey(seed byte, comment string) string {
	priv := ed25519.NewKeyFromSeed(slices.Repeat([]byte{seed}, ed25519.SeedSize))
	pub, err := ssh.NewPublicKey(priv.Public())
	if err != nil {
		panic(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))) + " " + comment
}

// place is a root for one case, with a neighbour directory nothing may touch.
type place struct {
	t    *testing.T
	root string
}

func newPlace(t *testing.T) place {
	base := t.TempDir()
	p := place{t, filepath.Join(base, "root")}
	p.dir("/", 0, 0o755)
	p.dir("/etc/ssh", 0, 0o755)
	p.dir("/root", 0, 0o700)
	p.dir("/tmp", 0, 0o777|fs.ModeSticky)
	p.dir("/home/alice", alice, 0o755)
	p.dir("/home/bob", bob, 0o755)
	p.dir("/home/bob/.ssh", bob, 0o700)
	p.file("/home/bob/.ssh/authorized_keys", bob, 0o600, testKey(9, "bob")+"\n")
	p.file("/etc/passwd", 0, 0o644, strings.Join([]string{
		"root:x:0:0:root:/root:/bin/bash",
		fmt.Sprintf("alice:x:%d:%d::/home/alice:/bin/bash", alice, alice),
		fmt.Sprintf("bob:x:%d:%d::/home/bob:/bin/bash", bob, bob),
		"",
	}, "\n"))
	p.file("/etc/shadow", 0, 0o640, "root:secret:1::::::\n")
	outside := filepath.Join(base, "outside")
	must(t, os.MkdirAll(outside, 0o777))
	must(t, os.Chmod(outside, 0o777))
	must(t, os.WriteFile(filepath.Join(outside, "authorized_keys"), []byte("outside\n"), 0o666))
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (p place) at(name string) string { return filepath.Join(p.root, name) }

func (p place) dir(name string, uid int, mode fs.FileMode) {
	must(p.t, os.MkdirAll(p.at(name), 0o755))
	must(p.t, os.Chown(p.at(name), uid, uid))
	must(p.t, os.Chmod(p.at(name), mode))
}

func (p place) file(name string, uid int, mode fs.FileMode, text string) {
	must(p.t, os.WriteFile(p.at(name), []byte(text), 0o600))
	must(p.t, os.Chown(p.at(name), uid, uid))
	must(p.t, os.Chmod(p.at(name), mode))
}

func (p place) link(target, name string, uid int) {
	must(p.t, os.Symlink(target, p.at(name)))
	must(p.t, os.Lchown(p.at(name), uid, uid))
}

func (p place) passwd(line string) {
	f, err := os.OpenFile(p.at("/etc/passwd"), os.O_APPEND|os.O_WRONLY, 0)
	must(p.t, err)
	_, err = f.WriteString(line + "\n")
	must(p.t, err)
	must(p.t, f.Close())
}

func (p place) sshd(text string) { p.file("/etc/ssh/sshd_config", 0, 0o644, text) }

// snapshot describes everything under the root and beside it.
func (p place) snapshot() map[string]string {
	all := make(map[string]string)
	base := filepath.Dir(p.root)
	must(p.t, filepath.WalkDir(base, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(name)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%v %d:%d", info.Mode(), st.Uid, st.Gid)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %x", sha256.Sum256(data))
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(name)
			text += " -> " + target
		}
		rel, _ := filepath.Rel(base, name)
		all[rel] = text
		return nil
	}))
	return all
}

func changed(before, after map[string]string) []string {
	var names []string
	for n := range before {
		if before[n] != after[n] {
			names = append(names, n)
		}
	}
	for n := range after {
		if _, ok := before[n]; !ok {
			names = append(names, n)
		}
	}
	return slices.Sorted(slices.Values(names))
}

func (p place) fifo(name string, uid int) { p.node(name, uid, unix.S_IFIFO, 0) }

func (p place) node(name string, uid int, kind uint32, dev int) {
	must(p.t, unix.Mknod(p.at(name), kind|0o666, dev))
	must(p.t, os.Chown(p.at(name), uid, uid))
}

func (p place) keyLink(target string) {
	p.dir("/home/alice/.ssh", alice, 0o700)
	p.link(target, "/home/alice/.ssh/authorized_keys", alice)
}

func (p place) keyHardLink(target string) {
	p.dir("/home/alice/.ssh", alice, 0o700)
	must(p.t, os.Link(p.at(target), p.at("/home/alice/.ssh/authorized_keys")))
}

func (p place) immutable(name string) {
	set := func(flag int) error {
		f, err := os.Open(p.at(name))
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flag)
	}
	must(p.t, set(unix.STATX_ATTR_IMMUTABLE))
	p.t.Cleanup(func() { set(0) })
}

func (p place) bind(from, to string) {
	must(p.t, unix.Mount(p.at(from), p.at(to), "", unix.MS_BIND, ""))
	p.t.Cleanup(func() { unix.Unmount(p.at(to), unix.MNT_DETACH) })
}
