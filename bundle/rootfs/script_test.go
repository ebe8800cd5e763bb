package rootfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

// killedEnv makes the test binary scan with a script and wait to be killed.
const killedEnv = "ROOTFS_TEST_KILLED"

func TestMain(m *testing.M) {
	if args := strings.Split(os.Getenv(killedEnv), "|"); len(args) == 3 {
		_, err := rootfs.Scan(context.Background(), rootfs.Options{Volume: args[0], Script: &rootfs.Script{Path: args[1], Dir: args[2], Stdout: os.Stdout}})
		fmt.Println("ended", err)
		select {}
	}
	os.Exit(m.Run())
}

func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755))
	return path
}

func TestScript(t *testing.T) {
	dir, scratch := mounted(t, "ext4"), t.TempDir()
	write(t, dir, map[string]string{"etc/a": "original", "etc/removed": "r", "hard1": "h", "srv/x": "x"})
	must(t, os.Link(filepath.Join(dir, "hard1"), filepath.Join(dir, "hard2")))
	must(t, unix.Lsetxattr(filepath.Join(dir, "srv"), "user.x", []byte("y"), 0))
	write(t, mountAt(t, dir, "data", "-t", "tmpfs", "tmpfs"), map[string]string{"secret": "s"})
	sub := filepath.Join(t.TempDir(), "img")
	run(t, "truncate", "-s", "64M", sub)
	run(t, "mkfs.ext4", "-q", sub)
	write(t, mountAt(t, dir, "home", "-o", "loop", sub), map[string]string{"u/f": "at home"})
	var before unix.Stat_t
	must(t, unix.Stat(dir, &before))

	var out bytes.Buffer
	r, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir, Script: &rootfs.Script{Dir: scratch, Stdout: &out, Path: script(t, `
		set -e
		echo "at $1 with $#"
		echo changed > "$1/etc/a"; rm "$1/etc/removed"; mkdir "$1/etc/new"; echo new > "$1/etc/new/file"; ln "$1/etc/a" "$1/etc/b"
		echo more >> "$1/home/u/f"; test ! -e "$1/data/secret"; mkdir "$1/tmp"; echo t > "$1/tmp/t"; chmod 700 "$1/srv"`)}})
	must(t, err)
	for path, want := range map[string]string{"etc/a": "changed\n", "etc/new/file": "new\n", "home/u/f": "at homemore\n", "hard1": "h"} {
		if got := read(t, r, path); got != want {
			t.Errorf("%s reads %q", path, got)
		}
	}
	unchanged(t, r)
	tr := r.Tree
	if tr.Find("etc/removed") != filetree.None || tr.Find("tmp/t") != filetree.None || tr.Find("data/secret") != filetree.None {
		t.Errorf("something is captured that should not be")
	}
	if tr.Find("etc/a") != tr.Find("etc/b") || tr.Find("hard1") != tr.Find("hard2") {
		t.Errorf("hard links are not one inode")
	}
	if tr.Mode(tr.Find("srv")) != unix.S_IFDIR|0o700 || len(tr.Xattrs(tr.Find("srv"))) != 1 {
		t.Errorf("srv has mode %o and attributes %v", tr.Mode(tr.Find("srv")), tr.Xattrs(tr.Find("srv")))
	}
	for id := range filetree.ID(tr.Len()) {
		for _, x := range tr.Xattrs(id) {
			if strings.HasPrefix(x.Name, "trusted.overlay") {
				t.Errorf("%s has %s", tr.Path(id), x.Name)
			}
		}
	}
	if o := leftOut(r, "data"); o == nil || o.Class != rootfs.NotLocal {
		t.Errorf("data: %+v", o)
	}
	if !strings.HasSuffix(out.String(), " with 1\n") || r.Facts.Type != "ext4" || !r.Facts.MountPoint || len(r.Problems) != 0 {
		t.Errorf("output %q, facts %+v, problems %v", out.String(), r.Facts, r.Problems)
	}
	must(t, r.Close())
	if got := string(mustRead(os.ReadFile(filepath.Join(dir, "etc/a")))); got != "original" {
		t.Errorf("the volume's own file reads %q", got)
	}
	var after unix.Stat_t
	must(t, unix.Stat(dir, &after))
	if before.Mtim != after.Mtim || len(mustDir(os.ReadDir(scratch))) != 0 {
		t.Errorf("something is left behind: %v", mustDir(os.ReadDir(scratch)))
	}
}

func TestScriptOfThisMachine(t *testing.T) {
	// The volume / holds the scratch space itself.
	var others []string
	for _, e := range mustDir(os.ReadDir("/")) {
		if e.Name() != "etc" {
			others = append(others, "/"+e.Name())
		}
	}
	r := scan(t, rootfs.Options{ExcludeLoose: others, Script: &rootfs.Script{Dir: t.TempDir(), Path: script(t, `echo hello > "$1/etc/instar-test-file"`)}})
	if got := read(t, r, "etc/instar-test-file"); got != "hello\n" {
		t.Errorf("reads %q", got)
	}
	if _, err := os.Lstat("/etc/instar-test-file"); err == nil {
		os.Remove("/etc/instar-test-file")
		t.Errorf("the script has changed this machine")
	}
	if r.Tree.Find("etc/passwd") == filetree.None {
		t.Errorf("etc/passwd is missing")
	}
}

func TestScriptFails(t *testing.T) {
	dir, scratch := t.TempDir(), t.TempDir()
	write(t, dir, map[string]string{"a": "a"})
	for name, c := range map[string]struct{ path, want string }{
		"exit code": {script(t, "echo oops >&2; exit 3"), "exit status 3"},
		"missing":   {"/nowhere/script", "cannot be run"},
		"no script": {filepath.Join(dir, "a"), "cannot be run"},
	} {
		var out bytes.Buffer
		r, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir, Script: &rootfs.Script{Path: c.path, Dir: scratch, Stderr: &out}})
		if err == nil {
			r.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if name == "exit code" && out.String() != "oops\n" {
			t.Errorf("output %q", out.String())
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var out notifier = func([]byte) { cancel() }
	if _, err := rootfs.Scan(ctx, rootfs.Options{Volume: dir, Script: &rootfs.Script{Path: script(t, "echo started; exec sleep 1000"), Dir: scratch, Stdout: out}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if left := mustDir(os.ReadDir(scratch)); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

type notifier func([]byte)

func (n notifier) Write(p []byte) (int, error) { n(p); return len(p), nil }

// TestScriptKilled: after kill -9, in the middle of the script or after it,
// neither mounts nor files nor the script are left.
func TestScriptKilled(t *testing.T) {
	dir := mounted(t, "tmpfs")
	write(t, dir, map[string]string{"a": "a"})
	for name, text := range map[string]string{"during": "echo $$ here; exec sleep 1000", "after": "echo $$ here; echo x > \"$1/new\""} {
		t.Run(name, func(t *testing.T) {
			scratch := t.TempDir()
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), killedEnv+"="+strings.Join([]string{dir, script(t, text), scratch}, "|"))
			out, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())
			buf := make([]byte, 1000)
			seen, until := "", map[string]string{"during": "here", "after": "ended"}[name]
			for !strings.Contains(seen, until) {
				n, err := out.Read(buf)
				must(t, err)
				seen += string(buf[:n])
			}
			if len(mustDir(os.ReadDir(scratch))) != 1 {
				t.Errorf("there is no scratch space to begin with")
			}
			must(t, cmd.Process.Kill())
			_ = cmd.Wait() // killed
			var pid int
			fmt.Sscan(seen, &pid)
			for unix.Kill(pid, 0) == nil || len(mustDir(os.ReadDir(scratch))) != 0 {
				time.Sleep(10 * time.Millisecond) // as long as the test may take: it has to happen
			}
			if m := string(mustRead(os.ReadFile("/proc/self/mountinfo"))); strings.Contains(m, scratch) {
				t.Errorf("a mount is left")
			}
		})
	}
}
