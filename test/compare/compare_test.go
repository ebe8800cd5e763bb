package compare_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/loopfs"
)

// plant makes a small hierarchy with one of everything that can differ.
func plant(t *testing.T, dir string) {
	t.Helper()
	script := `
set -e
cd "$1"
mkdir -p d/sub empty
echo one > d/file; ln d/file d/hard; ln -s file d/link
echo two > d/cap; setcap cap_net_raw+ep d/cap
echo three > d/acl; setfacl -m u:1000:rw d/acl; setfacl -m d:u:1000:rwx d/sub
mkfifo d/fifo; mknod d/dev c 1 3; echo x > d/attr; setfattr -n user.a -v b d/attr; setfattr -n trusted.a -v b d/attr
truncate -s 10M d/holes; echo end >> d/holes; echo f > d/flag
find . -exec touch -h -d '2020-02-02 02:02:02.123456789' {} +
`
	loopfs.Run(t, "bash", "-c", script, "bash", dir)
}

// TestDifferences proves that each comparer that should sees each difference,
// and that neither sees one between equal trees.
func TestDifferences(t *testing.T) {
	base := loopfs.Make(t, "ext4", 256<<20)
	const keepTime = ` && touch -h -d '2020-02-02 02:02:02.123456789' `
	for _, c := range []struct {
		name   string
		change string // run by bash inside the second tree
		tools  bool   // rsync, getfacl or getcap see it too
	}{
		{"content", "printf ONE > d/file && printf '\\n' >> d/file" + keepTime + "d/file", true},
		{"size", "printf onemore > d/file" + keepTime + "d/file", true},
		{"nanosecond", "touch -d '2020-02-02 02:02:02.123456788' d/file", true},
		{"directory's time", "touch -d '2020-02-02 02:02:03' d/sub", true},
		{"symlink's time", "touch -h -d '2020-02-02 02:02:03' d/link", true},
		{"mode", "chmod 0600 d/file", true},
		{"owner", "chown 77 d/cap && setcap cap_net_raw+ep d/cap", true},
		{"symlink's owner", "chown -h 0:77 d/link", true},
		{"capability", "setcap cap_net_raw+p d/cap", true},
		{"no capability", "setcap -r d/cap", true},
		{"acl", "setfacl -m u:1000:r d/acl", true},
		{"no acl", "setfacl -b d/acl", true},
		{"default acl", "setfacl -k d/sub", true},
		{"user xattr", "setfattr -n user.a -v c d/attr", true},
		{"trusted xattr", "setfattr -x trusted.a d/attr", true},
		{"new xattr", "setfattr -n user.b -v c d/attr", true},
		{"broken hard link", "rm d/hard && cp -p d/file d/hard" + keepTime + "d", true},
		{"symlink's target", "ln -sfn hard d/link" + keepTime + "d/link d", true},
		{"missing file", "rm d/attr" + keepTime + "d", true},
		{"missing directory", "rmdir empty" + keepTime + ".", true},
		{"additional file", "echo > new" + keepTime + ". new", true},
		{"device number", "rm d/dev && mknod d/dev c 1 5" + keepTime + "d/dev d", true},
		{"type of device", "rm d/dev && mknod d/dev b 1 3" + keepTime + "d/dev d", false}, // rsync sees the number only
		{"fifo became a file", "rm d/fifo && echo > d/fifo" + keepTime + "d/fifo d", true},
		{"filled hole", "cp --sparse=never d/holes d/h2 && mv d/h2 d/holes" + keepTime + "d/holes d", false},
		{"flag", "chattr +d d/flag", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := filepath.Join(base, "a"), filepath.Join(base, "b")
			for _, dir := range []string{a, b} {
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				plant(t, dir)
				t.Cleanup(func() {
					if err := os.RemoveAll(dir); err != nil {
						t.Error(err)
					}
				})
			}
			if own, tools := differences(t, a, b); len(own)+len(tools) > 0 {
				t.Fatalf("equal trees differ: %q %q", own, tools)
			}
			cmd := exec.Command("bash", "-ec", c.change)
			cmd.Dir = b
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			own, tools := differences(t, a, b)
			if len(own) == 0 {
				t.Error("the walk does not see it")
			}
			if c.tools != (len(tools) > 0) {
				t.Errorf("the tools see %q, want any: %v", tools, c.tools)
			}
		})
	}
}

func differences(t *testing.T, a, b string) (own, tools []string) {
	t.Helper()
	own, err := compare.Trees(a, b, compare.Options{})
	if err != nil {
		t.Fatal(err)
	}
	tools, err = compare.Tools(a, b)
	if err != nil {
		t.Fatal(err)
	}
	return own, tools
}

// TestSkip proves that what is skipped is not compared, and only that.
func TestSkip(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		for _, name := range []string{"kept", "skipped"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(dir), 0o600); err != nil {
				t.Fatal(err)
			}
			ts := []unix.Timespec{{Sec: 1}, {Sec: 1}}
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), ts, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	own, err := compare.Trees(a, b, compare.Options{Skip: func(p string) bool { return p == "skipped" }})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(own, func(d string) bool { return strings.HasPrefix(d, `"kept"`) }) ||
		slices.ContainsFunc(own, func(d string) bool { return strings.HasPrefix(d, `"skipped"`) }) {
		t.Errorf("differences %q", own)
	}
}
