package inject

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/inroot"
)

const (
	alice = 4001
	bob   = 4002
)

const standard = "home/alice/.ssh/authorized_keys"

type hostileCase struct {
	name  string
	user  string
	setup func(p place)
	want  string
	file  string
}

// hostile lists homes and configurations that may be traps. want "" means
// that the key must be written, to file (default: alice's authorized_keys);
// else the error has want in it and nothing at all has changed, but for .ssh
// directories that are the user's own.
var hostile = []hostileCase{
	{name: "nothing there", setup: func(p place) {}},
	{name: "ssh directory there", setup: func(p place) { p.dir("/home/alice/.ssh", alice, 0o700) }},
	{name: "ssh directory too open", setup: func(p place) { p.dir("/home/alice/.ssh", alice, 0o777) }},
	{name: "file empty", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", alice, 0o644, "")
	}},
	{name: "file read-only", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", alice, 0o400, testKey(2, "x")+"\n")
	}},
	{name: "file binary", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", alice, 0o600, "\x00\xff\xfe binary\n")
	}},
	{name: "old temporary file", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.link("/etc/shadow", "/home/alice/.ssh/.authorized_keys.0", alice)
	}},
	{name: "ssh directory is link to outside", setup: func(p place) { p.link("../../../outside", "/home/alice/.ssh", alice) }, want: "symbolic link"},
	{name: "ssh directory is absolute link", setup: func(p place) { p.link("/etc", "/home/alice/.ssh", alice) }, want: "symbolic link"},
	{name: "ssh directory is link to bob's", setup: func(p place) { p.link("../bob/.ssh", "/home/alice/.ssh", alice) }, want: "symbolic link"},
	{name: "ssh directory is link to own directory", setup: func(p place) {
		p.dir("/home/alice/real", alice, 0o700)
		p.link("real", "/home/alice/.ssh", alice)
	}, want: "symbolic link"},
	{name: "ssh directory is dangling link", setup: func(p place) { p.link("/nowhere", "/home/alice/.ssh", alice) }, want: "symbolic link"},
	{name: "ssh directory is link to itself", setup: func(p place) { p.link(".ssh", "/home/alice/.ssh", alice) }, want: "symbolic link"},
	{name: "ssh directory is link to proc", setup: func(p place) { p.link("/proc/1/root", "/home/alice/.ssh", alice) }, want: "symbolic link"},
	{name: "ssh directory is file", setup: func(p place) { p.file("/home/alice/.ssh", alice, 0o600, "x") }, want: "not a directory"},
	{name: "ssh directory is fifo", setup: func(p place) { p.fifo("/home/alice/.ssh", alice) }, want: "not a directory"},
	{name: "ssh directory is socket", setup: func(p place) { p.node("/home/alice/.ssh", alice, unix.S_IFSOCK, 0) }, want: "not a directory"},
	{name: "ssh directory is device", setup: func(p place) { p.node("/home/alice/.ssh", alice, unix.S_IFCHR, 1<<8|3) }, want: "not a directory"},
	{name: "ssh directory is bob's", setup: func(p place) { p.dir("/home/alice/.ssh", bob, 0o777) }, want: "belongs to user"},
	{name: "ssh directory is root's", setup: func(p place) { p.dir("/home/alice/.ssh", 0, 0o755) }, want: "belongs to user"},
	{name: "ssh directory is root's and closed", setup: func(p place) { p.dir("/home/alice/.ssh", 0, 0o700) }, want: "permission denied"},
	{name: "ssh directory not writable by its owner", setup: func(p place) { p.dir("/home/alice/.ssh", alice, 0o500) }},
	{name: "ssh directory without any right", setup: func(p place) { p.dir("/home/alice/.ssh", alice, 0) }, want: "permission denied"},
	{name: "ssh directory immutable", setup: func(p place) { p.dir("/home/alice/.ssh", alice, 0o700); p.immutable("/home/alice/.ssh") }, want: "not permitted"},
	{name: "ssh directory bind mounted", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.bind("/home/bob/.ssh", "/home/alice/.ssh")
	}, want: "filesystem is mounted"},
	{name: "file is link to shadow", setup: func(p place) { p.keyLink("/etc/shadow") }, want: "symbolic link"},
	{name: "file is relative link to shadow", setup: func(p place) { p.keyLink("../../../etc/shadow") }, want: "symbolic link"},
	{name: "file is link to outside", setup: func(p place) { p.keyLink("../../../../outside/authorized_keys") }, want: "symbolic link"},
	{name: "file is link to bob's", setup: func(p place) { p.keyLink("/home/bob/.ssh/authorized_keys") }, want: "symbolic link"},
	{name: "file is dangling link", setup: func(p place) { p.keyLink("/etc/cron.d/x") }, want: "symbolic link"},
	{name: "file is link to itself", setup: func(p place) { p.keyLink("authorized_keys") }, want: "symbolic link"},
	{name: "file is magic link", setup: func(p place) { p.keyLink("/proc/self/fd/0") }, want: "symbolic link"},
	{name: "file is link to own file", setup: func(p place) {
		p.file("/home/alice/keys", alice, 0o600, "x\n")
		p.keyLink("../keys")
	}, want: "symbolic link"},
	{name: "file is hard link to shadow", setup: func(p place) { p.keyHardLink("/etc/shadow") }, want: "permission denied"},
	{name: "file is hard link to passwd", setup: func(p place) { p.keyHardLink("/etc/passwd") }, want: "belongs to user 0"},
	{name: "file is hard link to bob's", setup: func(p place) { p.keyHardLink("/home/bob/.ssh/authorized_keys") }, want: "permission denied"},
	{name: "file is fifo", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.fifo("/home/alice/.ssh/authorized_keys", alice)
	}, want: "not a regular file"},
	{name: "file is device", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.node("/home/alice/.ssh/authorized_keys", alice, unix.S_IFCHR, 1<<8|5)
	}, want: "not a regular file"},
	{name: "file is socket", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.node("/home/alice/.ssh/authorized_keys", alice, unix.S_IFSOCK, 0)
	}, want: "no such device or address"},
	{name: "file is directory", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.dir("/home/alice/.ssh/authorized_keys", alice, 0o700)
	}, want: "not a regular file"},
	{name: "file is root's", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", 0, 0o644, testKey(2, "x"))
	}, want: "belongs to user 0"},
	{name: "file immutable", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", alice, 0o600, "")
		p.immutable("/home/alice/.ssh/authorized_keys")
	}, want: "not permitted"},
	{name: "file bind mounted", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", alice, 0o600, "")
		p.bind("/etc/shadow", "/home/alice/.ssh/authorized_keys")
	}, want: "filesystem is mounted"},
	{name: "file huge", setup: func(p place) {
		p.dir("/home/alice/.ssh", alice, 0o700)
		p.file("/home/alice/.ssh/authorized_keys", alice, 0o600, "")
		must(p.t, os.Truncate(p.at("/home/alice/.ssh/authorized_keys"), 1<<30))
	}, want: "longer than"},
	{name: "home is bob's", setup: func(p place) { p.dir("/home/alice", bob, 0o777) }, want: "belongs to user"},
	{name: "home is root's and closed", setup: func(p place) { p.dir("/home/alice", 0, 0o755) }, want: "permission denied"},
	{name: "home writable by all", setup: func(p place) { p.dir("/home/alice", alice, 0o777) }},
	{name: "home read-only", setup: func(p place) { p.dir("/home/alice", alice, 0o500) }, want: "permission denied"},
	{name: "home is file", setup: func(p place) {
		must(p.t, os.Remove(p.at("/home/alice")))
		p.file("/home/alice", alice, 0o600, "")
	}, want: "not a directory"},
	{name: "home absent", setup: func(p place) { must(p.t, os.Remove(p.at("/home/alice"))) }},
	{name: "home absent below a directory of bob", setup: func(p place) {
		must(p.t, os.Remove(p.at("/home/alice")))
		p.dir("/home", bob, 0o755)
	}, want: "others than root"},
	{name: "home absent below a directory open to all", setup: func(p place) {
		must(p.t, os.Remove(p.at("/home/alice")))
		p.dir("/home", 0, 0o777)
	}, want: "others than root"},
	{name: "home's parent absent", user: "carol", setup: func(p place) { p.passwd("carol:x:4003:4003::/srv/a/b:/bin/sh") }, want: "no such file"},
	{name: "home is dangling link", setup: func(p place) {
		must(p.t, os.Remove(p.at("/home/alice")))
		p.link("/nowhere", "/home/alice", 0)
	}, want: "file exists"},
	{name: "home leads out by dots", user: "carol", setup: func(p place) { p.passwd("carol:x:4003:4003::/home/../../outside:/bin/sh") }, want: "not usable"},
	{name: "home is a link out", setup: func(p place) {
		must(p.t, os.Remove(p.at("/home/alice")))
		p.link("../../../outside", "/home/alice", 0)
	}, want: "file exists"},
	{name: "home moved by root", setup: func(p place) {
		p.dir("/srv", 0, 0o755)
		must(p.t, os.Rename(p.at("/home"), p.at("/srv/home")))
		p.link("/srv/home", "/home", 0)
	}, file: "srv/home/alice/.ssh/authorized_keys"},
	{name: "home is /", user: "carol", setup: func(p place) { p.passwd("carol:x:4003:4003::/:/bin/sh") }, want: "not usable"},
	{name: "home relative", user: "carol", setup: func(p place) { p.passwd("carol:x:4003:4003::home/carol:/bin/sh") }, want: "not usable"},
	{name: "user is no change to the kernel", user: "carol", setup: func(p place) { p.passwd("carol:x:4294967295:4003::/home/alice:/bin/sh") }, want: "not usable"},
	{name: "user with negative id", user: "carol", setup: func(p place) { p.passwd("carol:x:-1:4003::/home/alice:/bin/sh") }, want: "not usable"},
	{name: "user with short line", user: "carol", setup: func(p place) { p.passwd("carol:x:0:0") }, want: "fields"},
	{name: "user unknown", user: "mallory", setup: func(p place) {}, want: "not in /etc/passwd"},
	{name: "user is a path", user: "../../root", setup: func(p place) {}, want: "is not one"},
	{name: "user with colon", user: "root:x", setup: func(p place) {}, want: "is not one"},
	{name: "user with newline", user: "root\nalice", setup: func(p place) {}, want: "is not one"},
	{name: "user is an option", user: "-R", setup: func(p place) {}, want: "is not one"},
	{name: "passwd is link out", setup: func(p place) {
		must(p.t, os.Rename(p.at("/etc/passwd"), filepath.Join(filepath.Dir(p.root), "outside", "passwd")))
		p.link("../../outside/passwd", "/etc/passwd", 0)
	}, want: "no such file"},
	{name: "passwd is fifo", setup: func(p place) { must(p.t, os.Remove(p.at("/etc/passwd"))); p.fifo("/etc/passwd", 0) }, want: "not a regular file"},
	{name: "root with link in its home", user: "root", setup: func(p place) { p.link("/etc", "/root/.ssh", 0) }, want: "symbolic link"},
	{name: "root", user: "root", setup: func(p place) {}, file: "root/.ssh/authorized_keys"},
	{name: "sshd: home by token", setup: func(p place) { p.sshd("AuthorizedKeysFile %h/.keys/%u\n") }, file: "home/alice/.keys/alice"},
	{name: "sshd: quoted, equals sign, comment", setup: func(p place) { p.sshd("authorizedkeysfile=\".ssh/k\" # x\n") }, file: "home/alice/.ssh/k"},
	{name: "sshd: central directory of root", setup: func(p place) {
		p.dir("/etc/keys", 0, 0o755)
		p.sshd("AuthorizedKeysFile /etc/keys/%u\n")
	}, file: "etc/keys/alice"},
	{name: "sshd: central directory of bob", setup: func(p place) {
		p.dir("/etc/keys", bob, 0o755)
		p.sshd("AuthorizedKeysFile /etc/keys/%u\n")
	}, want: "others than root"},
	{name: "sshd: central directory is link", setup: func(p place) {
		p.link("/home/bob/.ssh", "/etc/keys", 0)
		p.sshd("AuthorizedKeysFile /etc/keys/authorized_keys\n")
	}, want: "symbolic link"},
	{name: "sshd: central file is link", setup: func(p place) {
		p.dir("/etc/keys", 0, 0o755)
		p.link("/etc/shadow", "/etc/keys/alice", 0)
		p.sshd("AuthorizedKeysFile /etc/keys/%u\n")
	}, want: "symbolic link"},
	{name: "sshd: another home", setup: func(p place) { p.sshd("AuthorizedKeysFile %h/../bob/.ssh/authorized_keys\n") }, want: "others than root"},
	{name: "sshd: out of the root", setup: func(p place) { p.sshd("AuthorizedKeysFile /../../outside/authorized_keys\n") }, want: "no such file"},
	{name: "sshd: none", setup: func(p place) { p.sshd("AuthorizedKeysFile none\n") }, want: "none"},
	{name: "sshd: unknown token", setup: func(p place) { p.sshd("AuthorizedKeysFile %x\n") }, want: "%-sequence"},
	{name: "sshd: match block left aside", setup: func(p place) { p.sshd("Match User bob\nAuthorizedKeysFile /etc/x\n") }},
	{name: "sshd: included file", setup: func(p place) {
		p.dir("/etc/ssh/sshd_config.d", 0, 0o755)
		p.file("/etc/ssh/sshd_config.d/a.conf", 0, 0o600, "AuthorizedKeysFile .ssh/inc\n")
		p.sshd("Include /etc/ssh/sshd_config.d/*.conf\nAuthorizedKeysFile .ssh/main\n")
	}, file: "home/alice/.ssh/inc"},
	{name: "sshd: includes itself", setup: func(p place) { p.sshd("Include /etc/ssh/sshd_config\n") }, want: "files included"},
}

// TestHostileHomes takes every case three ways: keys authorized by name, keys of
// metadata as initrd and agent write them, and keys of metadata withdrawn.
func TestHostileHomes(t *testing.T) {
	if len(hostile) < 60 {
		t.Errorf("%d cases, fewer than the 60 promised", len(hostile))
	}
	key := testKey(1, "injected")
	sync := func(p place, user string, keys ...string) error {
		_, err := Apply(p.t.Context(), Options{Root: p.root, Steps: []Step{StepKeys}}, Instance{ID: "i-1", User: user, Keys: keys})
		return err
	}
	for _, c := range hostile {
		if c.user == "" {
			c.user = "alice"
		}
		if c.file == "" {
			c.file = standard
		}
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			c.setup(p)
			c.check(p, key, func() error {
				_, err := Authorize(p.root, c.user, []string{key}, func(string) {})
				return err
			})
		})
		t.Run(c.name+", keys of metadata", func(t *testing.T) {
			p := newPlace(t)
			c.setup(p)
			c.check(p, key, func() error { return sync(p, c.user, key) })
			// What could be written can be withdrawn: nothing else changes.
			if c.want != "" {
				return
			}
			before := p.snapshot()
			must(t, sync(p, c.user))
			for _, n := range changed(before, p.snapshot()) {
				if n != "root/"+c.file && n != "root/var/lib/instar/keys" {
					t.Errorf("withdrawing the key changed %s", n)
				}
			}
			if data, err := os.ReadFile(p.at(c.file)); err != nil || strings.Contains(string(data), key) {
				t.Errorf("%s still has the key (%v)", c.file, err)
			}
		})
		t.Run(c.name+", key withdrawn", func(t *testing.T) {
			p := newPlace(t)
			c.setup(p)
			user := c.user
			if CheckUser(user) != nil {
				return // can be in no record
			}
			// The record says that the key is metadata's; the home became hostile since.
			p.dir("/var/lib/instar", 0, 0o700)
			h, err := inroot.Open(p.root)
			must(t, err)
			defer h.Close()
			must(t, (&hierarchy{h}).writeKeyRecord(keyRecord{Users: map[string][]string{user: {key}}}))
			before := p.snapshot()
			_ = sync(p, user)
			for _, n := range changed(before, p.snapshot()) {
				if n != "root/"+c.file && n != "root/var/lib/instar/keys" {
					t.Errorf("%s changed", n)
				}
			}
		})
	}
}

// check does it and looks whether it came as the case wants it.
func (c hostileCase) check(p place, key string, do func() error) {
	t := p.t
	before := p.snapshot()
	err := do()
	after := p.snapshot()
	// The record of what came from metadata is not the user's.
	ours := func(n string) bool { return n == "root/var" || strings.HasPrefix(n, "root/var/lib") }
	if c.want != "" {
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want one with %q", err, c.want)
		}
		for _, n := range changed(before, after) {
			// Making or closing the user's own .ssh is no harm.
			if ours(n) || strings.HasPrefix(after[n], "d") && n == "root/home/alice/.ssh" {
				continue
			}
			t.Errorf("refused, yet %s changed: %q, was %q", n, after[n], before[n])
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(p.at(c.file))
	if err != nil || !strings.Contains("\n"+string(data), "\n"+key+"\n") {
		t.Fatalf("%s lacks the key (%v)", c.file, err)
	}
	wantMode := fmt.Sprintf("-rw------- %d:%d", alice, alice)
	if c.user == "root" {
		wantMode = "-rw------- 0:0"
	}
	if !strings.HasPrefix(c.file, "home/") && c.user != "root" && !strings.HasPrefix(c.file, "srv/") {
		wantMode = "-rw-r--r-- 0:0"
	}
	if got := after["root/"+c.file]; !strings.HasPrefix(got, wantMode) {
		t.Errorf("%s is %q, want %q", c.file, got, wantMode)
	}
	dir := filepath.Dir("root/" + c.file)
	for _, n := range changed(before, after) {
		if !ours(n) && n != "root/"+c.file && n != dir && !(n == "root/home/alice" && before[n] == "") {
			t.Errorf("%s changed beside the key file: %q, was %q", n, after[n], before[n])
		}
	}
}

// TestLinkRace flips .ssh between a directory and a link to bob's, and the key
// file between a file and a link, while keys are injected.
func TestLinkRace(t *testing.T) {
	p := newPlace(t)
	p.dir("/home/alice/real", alice, 0o700)
	p.link("../bob/.ssh", "/home/alice/trap", alice)
	p.file("/home/alice/real/authorized_keys", alice, 0o600, "")
	p.link("/home/bob/.ssh/authorized_keys", "/home/alice/real/trapfile", alice)
	must(t, os.Rename(p.at("/home/alice/real"), p.at("/home/alice/.ssh")))
	watched := func() map[string]string {
		s := p.snapshot()
		maps.DeleteFunc(s, func(n, _ string) bool {
			return strings.HasPrefix(n, "root/home/alice/") || n == "root/var" || strings.HasPrefix(n, "root/var/lib")
		})
		return s
	}
	before := watched()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	flips := 0
	wg.Go(func() {
		dir, trap := p.at("/home/alice/.ssh"), p.at("/home/alice/trap")
		for {
			select {
			case <-stop:
				return
			default:
			}
			unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, trap, unix.RENAME_EXCHANGE)
			unix.Renameat2(unix.AT_FDCWD, dir+"/authorized_keys", unix.AT_FDCWD, dir+"/trapfile", unix.RENAME_EXCHANGE)
			flips++
		}
	})
	written, refused := 0, 0
	for i := range 1500 {
		key := testKey(byte(i), fmt.Sprint("race ", i))
		var err error
		if i%2 == 0 {
			_, err = Authorize(p.root, "alice", []string{key}, func(string) {})
		} else { // adds this key, withdraws the one of before
			_, err = Apply(t.Context(), Options{Root: p.root, Steps: []Step{StepKeys}}, Instance{ID: "i-1", User: "alice", Keys: []string{key}})
		}
		if err != nil {
			refused++
		} else {
			written++
		}
	}
	close(stop)
	wg.Wait()
	t.Logf("%d flips; %d times written, %d refused", flips, written, refused)
	if written == 0 || refused == 0 {
		t.Errorf("the race never went both ways: %d written, %d refused", written, refused)
	}
	if diff := changed(before, watched()); len(diff) > 0 {
		t.Errorf("changed outside alice's home: %q", diff)
	}
}

func TestUserCannotSignalOrKeepRights(t *testing.T) {
	p := newPlace(t)
	err := asUser(alice, alice, func() error {
		if _, err := os.ReadFile(p.at("/etc/shadow")); err == nil {
			t.Error("as alice, shadow could be read")
		}
		if os.Getuid() != 0 || os.Geteuid() != 0 {
			t.Error("real or effective user changed: the user could signal the thread")
		}
		return nil
	})
	must(t, err)
	for range 50 {
		if _, err := os.ReadFile(p.at("/etc/shadow")); err != nil {
			t.Fatal("a thread kept the user's rights:", err)
		}
	}
}
