package boot

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/test/sysfault"
)

func TestMain(m *testing.M) {
	sysfault.Helper()
	child()
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testKey(seed byte, comment string) string {
	priv := ed25519.NewKeyFromSeed(slices.Repeat([]byte{seed}, ed25519.SeedSize))
	pub, err := ssh.NewPublicKey(priv.Public())
	if err != nil {
		panic(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))) + " " + comment
}

// cloud is a metadata server that wants tokens.
type cloud struct {
	mu     sync.Mutex
	tree   map[string]string
	status int // answers it to everything below meta-data/public-keys/ if not 0
	asked  []string
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/latest/")
	c.asked = append(c.asked, path)
	v, ok := c.tree[path]
	switch {
	case r.Method == http.MethodPut && path == "api/token":
		fmt.Fprint(w, "the-token")
	case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "the-token":
		w.WriteHeader(http.StatusUnauthorized)
	case c.status != 0 && strings.HasPrefix(path, "meta-data/public-keys/"):
		w.WriteHeader(c.status)
	case !ok:
		http.NotFound(w, r)
	default:
		fmt.Fprint(w, v)
	}
}

// keys replaces the instance's public keys.
func (c *cloud) keys(lines ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range c.tree {
		if strings.HasPrefix(name, "meta-data/public-keys/") {
			delete(c.tree, name)
		}
	}
	var list []string
	for i, l := range lines {
		list = append(list, fmt.Sprintf("%d=key%d", i, i))
		c.tree[fmt.Sprintf("meta-data/public-keys/%d/openssh-key", i)] = l
	}
	if len(lines) > 0 {
		c.tree["meta-data/public-keys/"] = strings.Join(list, "\n")
	}
}

func (c *cloud) set(path, value string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tree[path] = value
}

const alice = 4001

// host is a root with a metadata server beside it.
type host struct {
	t     testing.TB
	cloud *cloud
	o     Options
	told  []string
	out   bytes.Buffer
}

// furnish makes a small root in dir.
func furnish(t testing.TB, dir string) {
	for _, d := range []string{"etc/ssh", "var/lib", "run", "root", "home/alice"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	must(t, os.Chown(filepath.Join(dir, "home/alice"), alice, alice))
	must(t, os.WriteFile(filepath.Join(dir, "etc/passwd"), fmt.Appendf(nil, "root:x:0:0::/root:/bin/sh\nalice:x:%d:%d::/home/alice:/bin/sh\n", alice, alice), 0o644))
}

func newHost(t testing.TB) *host {
	h := &host{t: t, cloud: &cloud{tree: map[string]string{"meta-data/instance-id": "i-1", "meta-data/local-hostname": "web-1", "meta-data/ami-id": "ami-1"}}}
	server := httptest.NewServer(h.cloud)
	t.Cleanup(server.Close)
	dir := t.TempDir()
	furnish(t, dir)
	h.o = Options{Root: dir, Endpoint: server.URL, User: "alice", Wait: time.Minute, Output: &h.out, Report: func(line string, warn bool) {
		if warn {
			line = "warning: " + line
		}
		h.told = append(h.told, line)
	}}
	return h
}

func (h *host) at(name string) string { return filepath.Join(h.o.Root, name) }

func (h *host) read(name string) string {
	h.t.Helper()
	data, err := os.ReadFile(h.at(name))
	must(h.t, err)
	return string(data)
}

func (h *host) stage(s Stage) error { return Run(h.t.Context(), h.o, s) }

// boot runs all stages, as a machine that starts does: with an empty /run.
func (h *host) boot() {
	h.t.Helper()
	must(h.t, os.RemoveAll(h.at("run/instar")))
	h.told = nil
	for _, s := range Stages() {
		must(h.t, h.stage(s))
	}
}

func (h *host) saw(part string) bool {
	return slices.ContainsFunc(h.told, func(l string) bool { return strings.Contains(l, part) })
}

const authorized = "home/alice/.ssh/authorized_keys"

func TestStages(t *testing.T) {
	h := newHost(t)
	h.cloud.keys(testKey(1, "laptop"))
	h.cloud.set("user-data", "#!/bin/sh\necho ran as $INSTANCE_ID; echo x >>"+h.at("ran")+"\n")
	h.boot()
	for name, want := range map[string]string{"etc/hostname": "web-1\n", authorized: testKey(1, "laptop") + "\n", "ran": "x\n"} {
		if got := h.read(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if h.out.String() != "ran as i-1\n" {
		t.Errorf("the script said %q", h.out.String())
	}
	hostKey, machineID := h.read("etc/ssh/ssh_host_ed25519_key.pub"), h.read("etc/machine-id")
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(hostKey))
	must(t, err)
	if !h.saw("SSH host key ssh-ed25519 " + ssh.FingerprintSHA256(key)) {
		t.Errorf("the host key's fingerprint is not told: %q", h.told)
	}

	// The second boot of the same instance.
	h.boot()
	if h.read("ran") != "x\n" || h.read("etc/ssh/ssh_host_ed25519_key.pub") != hostKey || h.read("etc/machine-id") != machineID {
		t.Error("the second boot did again what is done once")
	}
	if !h.saw("ran before (finished)") || h.saw("SSH host key") {
		t.Errorf("told %q", h.told)
	}
	s, err := ReadStatus(h.o)
	must(t, err)
	if s.Instance != "i-1" || s.UserData != "finished" || len(s.Keys["alice"]) != 1 || len(s.HostKeys) != 2 || s.CloudInit {
		t.Errorf("status %+v", s)
	}

	// Another instance of the same disk.
	h.cloud.set("meta-data/instance-id", "i-2")
	h.boot()
	if h.read("ran") != "x\nx\n" || h.read("etc/ssh/ssh_host_ed25519_key.pub") == hostKey || h.read("etc/machine-id") == machineID {
		t.Error("another instance has the first one's")
	}
	// A facts file of another instance: somebody answers in metadata's place.
	h.cloud.set("meta-data/instance-id", "i-3")
	for _, st := range []Stage{Keys, UserData} {
		if err := h.stage(st); err == nil || !strings.Contains(err.Error(), `instance "i-3", where it was "i-2"`) {
			t.Errorf("%s as another instance: %v", st, err)
		}
	}
	if err := h.stage("x"); err == nil {
		t.Error("an unknown stage ran")
	}
}

func TestFailedAndInterruptedUserData(t *testing.T) {
	h := newHost(t)
	h.cloud.set("user-data", "#!/bin/sh\necho x >>"+h.at("ran")+"\nexit 3\n")
	must(t, h.stage(Network))
	if err := h.stage(UserData); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("a script that fails: %v", err)
	}
	must(t, h.stage(UserData))
	must(t, h.stage(Final))
	if h.read("ran") != "x\n" || !h.saw("warning: instance i-1 is ready; user data: failed") {
		t.Errorf("ran %q, told %q", h.read("ran"), h.told)
	}
	if s, err := ReadStatus(h.o); err != nil || s.UserData != "failed" || s.Steps[len(s.Steps)-2].Note != "exit status 3" {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestAdopt(t *testing.T) {
	h := newHost(t)
	h.cloud.set("user-data", "#!/bin/sh\necho x >>"+h.at("ran")+"\n")
	must(t, os.WriteFile(h.at("etc/ssh/ssh_host_ed25519_key.pub"), []byte(testKey(5, "host")), 0o644))
	id, err := Adopt(t.Context(), h.o)
	if err != nil || id != "i-1" {
		t.Fatal(id, err)
	}
	h.boot()
	if _, err := os.Stat(h.at("ran")); err == nil || h.read("etc/ssh/ssh_host_ed25519_key.pub") != testKey(5, "host") {
		t.Error("an adopted machine got new keys, or its user data ran")
	}
	h.cloud.set("meta-data/instance-id", "i-2")
	h.boot()
	if h.read("ran") != "x\n" || h.read("etc/ssh/ssh_host_ed25519_key.pub") == testKey(5, "host") {
		t.Error("another instance of the adopted machine is still the first")
	}
}

func TestCloudInitIsInCharge(t *testing.T) {
	h := newHost(t)
	h.cloud.keys(testKey(1, "laptop"))
	h.cloud.set("user-data", "#!/bin/sh\necho x >>"+h.at("ran")+"\n")
	for _, n := range []string{"usr/bin/cloud-init", "usr/lib/systemd/system/cloud-init.service"} {
		must(t, os.MkdirAll(filepath.Dir(h.at(n)), 0o755))
		must(t, os.WriteFile(h.at(n), nil, 0o755))
	}
	h.boot()
	for _, n := range []string{"ran", authorized, "etc/hostname", "etc/machine-id", "etc/ssh/ssh_host_ed25519_key.pub"} {
		if _, err := os.Stat(h.at(n)); err == nil {
			t.Errorf("%s was made though cloud-init is in charge", n)
		}
	}
	if !strings.Contains(h.read("run/instar/instance.json"), `"ami-id": "ami-1"`) || !h.saw("stays in charge") {
		t.Errorf("told %q", h.told)
	}
	if !h.saw("user data was left to cloud-init") {
		t.Errorf("told %q", h.told)
	}
	// Switched off, it has done what is done once for this instance.
	must(t, os.WriteFile(h.at("etc/ssh/ssh_host_ed25519_key.pub"), []byte(testKey(5, "host")), 0o644))
	must(t, os.MkdirAll(h.at("etc/cloud"), 0o755))
	must(t, os.WriteFile(h.at("etc/cloud/cloud-init.disabled"), nil, 0o644))
	h.boot()
	if _, err := os.Stat(h.at("ran")); err == nil || h.read("etc/ssh/ssh_host_ed25519_key.pub") != testKey(5, "host") {
		t.Error("after cloud-init was switched off the instance got new keys, or its user data ran")
	}
	if h.read(authorized) != testKey(1, "laptop")+"\n" {
		t.Error("after cloud-init was switched off keys are not kept in step")
	}
	h.cloud.set("meta-data/instance-id", "i-2")
	h.boot()
	if h.read("ran") != "x\n" || h.read("etc/ssh/ssh_host_ed25519_key.pub") == testKey(5, "host") {
		t.Error("another instance of that machine is still the first")
	}
}

func TestWaitForMetadata(t *testing.T) {
	h := newHost(t)
	h.o.Endpoint = "http://127.0.0.1:1"
	h.o.Wait = time.Second
	if err := h.stage(Network); err == nil || !strings.Contains(err.Error(), "no metadata within 1s") || !h.saw("waiting for metadata") {
		t.Errorf("no server: %v, told %q", err, h.told)
	}
	// A service without tokens is not believed.
	old := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		fmt.Fprint(w, "i-9")
	}))
	defer old.Close()
	h.o.Endpoint = old.URL
	if err := h.stage(Network); err == nil {
		t.Error("metadata without tokens was believed")
	}
}

// TestKeysInStep lets metadata and the user change their minds: of what the
// user wrote nothing is ever lost, of what metadata no longer says nothing stays.
func TestKeysInStep(t *testing.T) {
	h := newHost(t)
	own := "# mine\n" + testKey(7, "alice's own") + "\nfrom=\"10.0.0.1\" " + testKey(2, "restricted")
	must(t, os.Mkdir(h.at("home/alice/.ssh"), 0o700))
	must(t, os.WriteFile(h.at(authorized), []byte(own), 0o600))
	for _, n := range []string{"home/alice/.ssh", authorized} {
		must(t, os.Chown(h.at(n), alice, alice))
	}
	must(t, h.stage(Network))
	a, b, mine := testKey(1, "a"), testKey(2, "b"), testKey(7, "same as alice's own")
	check := func(what, want string) {
		t.Helper()
		if got := h.read(authorized); got != want {
			t.Errorf("%s: authorized_keys is\n%s\nwant\n%s", what, got, want)
		}
	}
	step := func(what, want string, keys ...string) {
		t.Helper()
		h.cloud.keys(keys...)
		if err := h.stage(Keys); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		check(what, want)
	}
	step("no keys", own)
	step("two keys, one of them alice's", own+"\n"+a+"\n", a, mine)
	step("the same", own+"\n"+a+"\n", a, mine)
	step("b instead of a; what is alice's stays hers", own+"\n"+b+"\n", b)
	// alice edits the file meanwhile: the comment of a key does not matter.
	must(t, os.WriteFile(h.at(authorized), []byte(own+"\n"+testKey(2, "edited")+"\n# after\n"), 0o600))
	step("none", own+"\n# after\n")
	step("a again", own+"\n# after\n"+a+"\n", a)

	// A server in trouble withdraws nothing.
	for _, status := range []int{http.StatusInternalServerError, http.StatusForbidden, http.StatusUnauthorized, http.StatusServiceUnavailable} {
		h.cloud.status = status
		if err := h.stage(Keys); err == nil {
			t.Errorf("status %d passes for an answer", status)
		}
		check(fmt.Sprint("status ", status), own+"\n# after\n"+a+"\n")
	}
	h.cloud.status = 0
	// Nor does an answer that is damaged.
	h.cloud.keys("ssh-ed25519 AAAA")
	if err := h.stage(Keys); err == nil {
		t.Error("a damaged key passes")
	}
	check("a damaged key", own+"\n# after\n"+a+"\n")
	h.cloud.set("meta-data/public-keys/", "<html>")
	if err := h.stage(Keys); err == nil {
		t.Error("a damaged list passes")
	}
	check("a damaged list", own+"\n# after\n"+a+"\n")

	// Another login user: the old one's go.
	h.o.User = "root"
	step("another user", own+"\n# after\n", b)
	if got := h.read("root/.ssh/authorized_keys"); got != b+"\n" {
		t.Errorf("root's keys are %q", got)
	}
	// A record that cannot be read: keys are added, none withdrawn.
	must(t, os.WriteFile(h.at("var/lib/instar/keys"), []byte("{"), 0o600))
	h.told = nil
	step("damaged record", own+"\n# after\n", a)
	if got := h.read("root/.ssh/authorized_keys"); got != b+"\n"+a+"\n" || !h.saw("a new record is begun") {
		t.Errorf("root's keys are %q, told %q", got, h.told)
	}
	// A login user who is not there, a typing error say, locks nobody out.
	rooted := h.read("root/.ssh/authorized_keys")
	h.o.User = "alcie"
	h.cloud.keys(a, b)
	if err := h.stage(Keys); err == nil || !strings.Contains(err.Error(), "no key of another user is withdrawn") {
		t.Errorf("a login user who is not there: %v", err)
	}
	if got := h.read("root/.ssh/authorized_keys"); got != rooted {
		t.Errorf("root's keys are %q, were %q", got, rooted)
	}
	// A user who is no more does not stop the others.
	h.o.User = "alice"
	step("back to alice", own+"\n# after\n"+a+"\n", a)
	must(t, os.WriteFile(h.at("etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\n"), 0o644))
	h.o.User = "root"
	h.told = nil
	step("alice is gone", own+"\n# after\n"+a+"\n", a)
	if !h.saw("alice, who had keys from metadata, is no more") {
		t.Errorf("told %q", h.told)
	}
}
