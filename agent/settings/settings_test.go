package settings_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/settings"
	"github.com/instar-image/instar/agent/task"
)

func TestParse(t *testing.T) {
	s, err := settings.Parse([]byte(`# all of it
admin-group: admins
view-group: viewers
running: 2
keep: 7
limits: {cpu-weight: 20, cpu-quota: 50, io-weight: 30, read-share: 50, read-rate: 1048576, upload-rate: -1, memory: 1073741824, foreground: true}
quiesce: {stop: [a.service], freeze: [b.service], filesystems: [/srv], limit: 90s}
secret-key-file: /etc/instar/secret
secret-key-encrypted: true
metrics-listen: 127.0.0.1:9256
tasks-from: {store: s3://images/fleet, metadata: 'http://[fd00:ec2::254]', interval: 1m, signers: /etc/instar/catalog, accounts: ['111122223333'], bundle-to: [images/web-*], create-image: true, volume: /srv, exclude: [/srv/x], recipients: [age1x], no-kernel: true}
`))
	if err != nil {
		t.Fatal(err)
	}
	if s.AdminGroup != "admins" || s.ViewGroup != "viewers" || s.Running != 2 || s.Keep != 7 || s.SecretKeyFile != "/etc/instar/secret" || !s.Encrypted || s.MetricsListen != "127.0.0.1:9256" {
		t.Errorf("%+v", s)
	}
	if want := (task.Limits{CPUWeight: 20, CPUQuota: 50, IOWeight: 30, ReadShare: 50, ReadRate: 1 << 20, UploadRate: -1, Memory: 1 << 30, Foreground: true}); s.Limits != want {
		t.Errorf("%+v", s.Limits)
	}
	if q := s.Quiesce; q == nil || q.Stop[0] != "a.service" || q.Freeze[0] != "b.service" || q.Filesystems[0] != "/srv" || time.Duration(q.Limit) != 90*time.Second {
		t.Errorf("%+v", s.Quiesce)
	}
	if f := s.TasksFrom; f == nil || f.Store != "s3://images/fleet" || f.Metadata == "" || time.Duration(f.Interval) != time.Minute || f.Signers != "/etc/instar/catalog" {
		t.Errorf("%+v", f)
	} else if r := f.Rules(); r.Accounts[0] != "111122223333" || r.BundleTo[0] != "images/web-*" || !r.CreateImage || r.Store != f.Store || r.Volume != "/srv" ||
		r.Exclude[0] != "/srv/x" || r.Recipients[0] != "age1x" || !r.NoKernel {
		t.Errorf("%+v", r)
	}
	for _, empty := range []string{"", "# nothing\n", "---\n"} {
		if _, err := settings.Parse([]byte(empty)); err != nil {
			t.Errorf("%q: %v", empty, err)
		}
	}
}

func TestMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"admin_group: x":                                               "admin_group",
		"running: 65":                                                  "running",
		"limits: {cpu-weight: 0.5}":                                    "0.5",
		"limits: {io-weight: 20000}":                                   "io-weight",
		"quiesce: {stop: [app]}":                                       "no name of a unit",
		"quiesce: {limit: often}":                                      "often",
		"secret-key-file: secret":                                      "absolute",
		"secret-key-encrypted: true":                                   "secret-key-file",
		"metrics-listen: 0.0.0.0:9256":                                 "loopback",
		"metrics-listen: 127.0.0.1":                                    "loopback",
		"tasks-from: {create-image: true}":                             "store",
		"tasks-from: {store: b/p}":                                     "allows nothing",
		"tasks-from: {store: b/p, create-image: true, interval: 1ms}":  "interval",
		"tasks-from: {store: b/p, create-image: true, instance: ../x}": "no instance",
		"tasks-from: {store: b/p, create-image: true, instance: i-1, metadata: 'x:'}": "one of them",
		"tasks-from: {store: b/p, create-image: true, signers: x}":                    "absolute",
		"tasks-from: {store: b/p, create-image: true, volume: x}":                     "absolute",
		"tasks-from: {store: b/p, create-image: true, accounts: [me]}":                "12 digits",
		"tasks-from: {store: b/p, bundle-to: [images]}":                               "BUCKET/PREFIX",
		"- a list":                               "",
		"running: 1\nrunning: 2":                 "running",
		"limits: &a {cpu-weight: 5}\nkeep: *a\n": "",
	} {
		if _, err := settings.Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	if s, err := settings.Read(file); err != nil || s.Running != 0 {
		t.Errorf("no file: %+v, %v", s, err)
	}
	if err := os.WriteFile(file, []byte("running: 0\nunknown: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := settings.Read(file); err == nil || !strings.Contains(err.Error(), "agent.yaml") || !strings.Contains(err.Error(), "unknown") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(file, []byte(strings.Repeat("# x\n", 1<<19)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := settings.Read(file); err == nil || !strings.Contains(err.Error(), "longer") {
		t.Errorf("%v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("running: 2\nlimits: {cpu-weight: 20}\nquiesce: {stop: [a.service], limit: 90s}\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := settings.Parse(data)
		if err == nil && (s.Running < 0 || s.Limits.Check() != nil || s.Quiesce.Check() != nil) {
			t.Fatalf("%q was taken: %+v", data, s)
		}
	})
}
