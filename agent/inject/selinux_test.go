package inject

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/loopfs"
)

const etcLabel = "system_u:object_r:etc_t:s0"

func labelOf(t *testing.T, name string) string {
	t.Helper()
	b := make([]byte, 256)
	n, err := unix.Lgetxattr(name, "security.selinux", b)
	if err == unix.ENODATA {
		return ""
	}
	if err != nil {
		t.Fatalf("label of %s: %v", name, err)
	}
	return strings.TrimRight(string(b[:n]), "\x00")
}

// TestSELinuxLabels makes an instance of a labelled image: what is new in it
// has the policy's label, or its directory's, and what is replaced keeps its own.
func TestSELinuxLabels(t *testing.T) {
	p := newPlace(t)
	p.root = loopfs.Make(t, "ext4", 64<<20)
	p.dir("/etc/ssh", 0, 0o755)
	p.dir("/home/alice", alice, 0o700)
	p.dir("/var/lib", 0, 0o755)
	p.file("/etc/passwd", 0, 0o644, "root:x:0:0::/root:/bin/sh\nalice:x:4001:4001::/home/alice:/bin/sh\n")
	p.file("/etc/fstab", 0, 0o644, "UUID=gone /home ext4 defaults 0 2\n")
	o := p.systemd()
	o.Present = func(string) bool { return false }
	policy := func(text string) {
		p.dir("/etc/selinux/targeted/contexts/files", 0, 0o755)
		p.file("/etc/selinux/config", 0, 0o644, "# comment\nSELINUX=enforcing\nSELINUXTYPE=targeted\n")
		p.file("/etc/selinux/targeted/contexts/files/file_contexts", 0, 0o644, text)
	}
	policy("/etc/.*\t" + etcLabel + "\n/etc/ssh/ssh_host.*_key\t--\tsystem_u:object_r:sshd_key_t:s0\n" +
		"/var/lib(/.*)?\tsystem_u:object_r:var_lib_t:s0\n")
	p.file("/etc/selinux/targeted/contexts/files/file_contexts.homedirs", 0, 0o644, "/home/[^/]+/\\.ssh(/.*)?\tunconfined_u:object_r:ssh_home_t:s0\n")
	mark := func(name, label string) {
		t.Helper()
		must(t, unix.Lsetxattr(p.at(name), "security.selinux", append([]byte(label), 0), 0))
	}
	must(t, filepath.WalkDir(p.root, func(name string, d os.DirEntry, err error) error {
		if err == nil {
			err = unix.Lsetxattr(name, "security.selinux", append([]byte("system_u:object_r:captured_t:s0"), 0), 0)
		}
		return err
	}))
	mark("/etc/fstab", "system_u:object_r:own_t:s0")
	in := Instance{ID: "i-1", Hostname: "h", User: "alice", Keys: []string{testKey(1, "k")}}
	_, err := Apply(t.Context(), o, in)
	must(t, err)
	for name, want := range map[string]string{
		"/etc/ssh/ssh_host_ed25519_key":     "sshd_key_t", // by the policy
		"/etc/ssh/ssh_host_ecdsa_key.pub":   "etc_t",      // by a wider pattern
		"/etc/ssh/ssh_host_ed25519_key.pub": "captured_t", // replaced: it keeps its own
		"/home/alice/.ssh":                  "ssh_home_t",
		"/home/alice/.ssh/authorized_keys":  "ssh_home_t",
		"/etc/hostname":                     "etc_t",
		"/etc/machine-id":                   "captured_t", // likewise
		"/etc/fstab":                        "own_t",
		"/var/lib/instar":                   "var_lib_t",
		"/var/lib/instar/journal":           "var_lib_t",
	} {
		if got := labelOf(t, p.at(name)); !strings.HasSuffix(got, ":"+want+":s0") {
			t.Errorf("%s is labelled %q, want %s", name, got, want)
		}
	}
	// Without a policy in it a new file takes after its directory.
	must(t, os.RemoveAll(p.at("/etc/selinux")))
	must(t, os.RemoveAll(p.at("/home/alice/.ssh")))
	mark("/home/alice", "unconfined_u:object_r:user_home_dir_t:s0")
	in.ID = "i-2"
	_, err = Apply(t.Context(), o, in)
	must(t, err)
	for _, name := range []string{"/home/alice/.ssh", "/home/alice/.ssh/authorized_keys"} {
		if got := labelOf(t, p.at(name)); got != "unconfined_u:object_r:user_home_dir_t:s0" {
			t.Errorf("%s is labelled %q", name, got)
		}
	}
	// A directory without a label is of an image without SELinux.
	must(t, unix.Lremovexattr(p.at("/etc/ssh"), "security.selinux"))
	policy("/etc/.*\t" + etcLabel + "\n")
	in.ID = "i-3"
	_, err = Apply(t.Context(), o, in)
	must(t, err)
	if got := labelOf(t, p.at("/etc/ssh/ssh_host_ed25519_key")); got != "" {
		t.Errorf("a key of an image without labels is labelled %q", got)
	}
}
