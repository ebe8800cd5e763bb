package boot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/sysfault"
)

// stageEnv makes the test binary run one stage: "STAGE ROOT ENDPOINT".
const stageEnv = "INSTAR_BOOT_TEST_STAGE"

// child runs the stage that the environment names, and ends the process.
func child() {
	f := strings.Fields(os.Getenv(stageEnv))
	if len(f) != 3 {
		return
	}
	err := Run(context.Background(), Options{Root: f[1], Endpoint: f[2], User: "alice", Wait: time.Minute, Output: os.Stdout}, Stage(f[0]))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// machine is a host whose root is a filesystem that can lose its power.
type machine struct {
	*host
	image string
}

// cut is a power cut: what was not made durable is gone. The filesystem is
// mounted again as the next start would.
func (m *machine) cut() {
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN
		noLogFlush = 2
	)
	m.t.Helper()
	dir, err := os.Open(m.o.Root)
	must(m.t, err)
	err = unix.IoctlSetPointerInt(int(dir.Fd()), shutdown, noLogFlush)
	dir.Close()
	must(m.t, err)
	loopfs.Unmount(m.t, m.o.Root)
	m.o.Root = loopfs.Mount(m.t, m.image)
}

// crashes runs a stage in a process of its own once for each of its operations
// on files and kills it there, with and without the power going too, and hands
// each outcome to check. prepare makes the state before.
func crashes(t *testing.T, stage Stage, prepare, check func(m *machine, done bool)) {
	self, err := os.Executable()
	must(t, err)
	// In memory: what is durable is decided by the filesystem on the loop, not by
	// the disk beneath.
	memory, err := os.MkdirTemp("/dev/shm", "instar-boot-")
	must(t, err)
	defer os.RemoveAll(memory)
	points := 0
	for _, power := range []bool{false, true} {
		for at := 1; ; at++ {
			m := &machine{host: newHost(t)}
			if !power {
				m.o.Root = filepath.Join(memory, fmt.Sprint("root", at))
				furnish(t, m.o.Root)
			}
			if power {
				m.image = filepath.Join(memory, fmt.Sprint("disk", at))
				must(t, os.WriteFile(m.image, nil, 0o600))
				must(t, os.Truncate(m.image, 8<<20))
				loopfs.Run(t, "mkfs.ext4", "-q", "-F", m.image)
				m.o.Root = loopfs.Mount(t, m.image)
				furnish(t, m.o.Root)
			}
			prepare(m, false)
			if power {
				loopfs.Run(t, "sync", "-f", m.o.Root) // of this filesystem alone
			}
			env := []string{fmt.Sprintf("%s=%s %s %s", stageEnv, stage, m.o.Root, m.o.Endpoint)}
			r := sysfault.Run(t, sysfault.Fault{Dir: m.o.Root, At: at}, env, self)
			if power {
				m.cut()
			}
			check(m, !r.Hit && r.Code == 0)
			if power {
				loopfs.Unmount(t, m.o.Root)
				must(t, os.Remove(m.image))
			}
			if t.Failed() {
				t.Fatalf("killed at operation %d, %+v, power cut %v: %s%s", at, r.Failed, power, r.Stdout, r.Stderr)
			}
			if !r.Hit {
				if r.Code != 0 {
					t.Fatalf("without a fault: %d %s", r.Code, r.Stderr)
				}
				break
			}
			points++
		}
	}
	t.Logf("%s: %d points", stage, points)
	if points < 20 {
		t.Errorf("only %d points: the operations are not seen", points)
	}
}

// TestUserDataCrashes: at most once whatever happens, and visibly so. Each
// script of the user data writes a letter of its own.
func TestUserDataCrashes(t *testing.T) {
	scripts := evidence.Cases(2, 25)
	starts := filepath.Join(t.TempDir(), "starts")
	ran := func() string {
		data, err := os.ReadFile(starts)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(data)
	}
	var all strings.Builder
	mime := "Content-Type: multipart/mixed; boundary=\"b\"\nMIME-Version: 1.0\n\n"
	for i := range scripts {
		letter := string(rune('a' + i))
		all.WriteString(letter)
		mime += "--b\nContent-Type: text/x-shellscript\n\n#!/bin/sh\nprintf " + letter + " >>" + starts + "\n\n"
	}
	mime += "--b--\n"
	crashes(t, UserData, func(m *machine, _ bool) {
		os.Remove(starts)
		m.cloud.set("user-data", mime)
		must(t, m.stage(Network))
	}, func(m *machine, done bool) {
		before := ran()
		s, err := ReadStatus(m.o)
		must(t, err)
		if done && s.UserData != "finished" {
			t.Errorf("it was acknowledged, and is %q now", s.UserData)
		}
		switch s.UserData {
		case "finished", "interrupted":
		case "":
			if before != "" {
				t.Errorf("it started, and the journal knows nothing of it")
			}
		default:
			t.Errorf("after the crash it is %q", s.UserData)
		}
		if s.UserData == "finished" && before != all.String() {
			t.Errorf("finished, and what ran is %q", before)
		}
		// The next boots.
		for range 2 {
			must(t, m.stage(Network))
			must(t, m.stage(UserData))
		}
		after, err := ReadStatus(m.o)
		must(t, err)
		want := s.UserData
		if want == "" {
			want = "finished"
		}
		if got := ran(); !strings.HasPrefix(all.String(), got) || want == "interrupted" && got != before || want == "finished" && got != all.String() {
			t.Errorf("%q had run before the crash, and %q after the next boots", before, got)
		}
		if after.UserData != want {
			t.Errorf("it was %q after the crash, and is %q after the next boots", s.UserData, after.UserData)
		}
		// Another instance is not held back by it.
		m.cloud.set("meta-data/instance-id", "i-2")
		must(t, os.RemoveAll(m.at("run/instar")))
		os.Remove(starts)
		must(t, m.stage(Network))
		must(t, m.stage(UserData))
		if ran() != all.String() {
			t.Error("another instance's user data did not run")
		}
	})
}

// TestKeysCrashes: the user's own lines are always there, whole, and what
// metadata gave can always be withdrawn.
func TestKeysCrashes(t *testing.T) {
	own := "# mine\n" + testKey(7, "own") + "\n"
	gone, stays, comes := testKey(1, "gone"), testKey(2, "stays"), testKey(3, "comes")
	crashes(t, Keys, func(m *machine, _ bool) {
		must(t, os.Mkdir(m.at("home/alice/.ssh"), 0o700))
		must(t, os.WriteFile(m.at(authorized), []byte(own), 0o600))
		for _, n := range []string{"home/alice/.ssh", authorized} {
			must(t, os.Chown(m.at(n), alice, alice))
		}
		must(t, m.stage(Network))
		m.cloud.keys(gone, stays)
		must(t, m.stage(Keys))
		m.cloud.keys(stays, comes)
	}, func(m *machine, done bool) {
		switch got := m.read(authorized); {
		case got == own+gone+"\n"+stays+"\n" && !done, got == own+stays+"\n"+comes+"\n":
		default:
			t.Errorf("after the crash authorized_keys is\n%s", got)
		}
		must(t, m.stage(Keys))
		if got, want := m.read(authorized), own+stays+"\n"+comes+"\n"; got != want {
			t.Errorf("after the next run authorized_keys is\n%s\nwant\n%s", got, want)
		}
		m.cloud.keys()
		must(t, m.stage(Keys))
		if got := m.read(authorized); got != own {
			t.Errorf("all withdrawn, authorized_keys is\n%s\nwant\n%s", got, own)
		}
		if s, err := ReadStatus(m.o); err != nil || len(s.Keys) > 0 {
			t.Errorf("status %+v, %v", s, err)
		}
	})
}
