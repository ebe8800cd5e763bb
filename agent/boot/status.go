package boot

import (
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/userdata"
)

// Status is what was done to this machine for its instance.
type Status struct {
	Instance  string // "" if no boot has learnt it since the machine started
	CloudInit bool   // cloud-init is in charge
	UserData  string // state of the user data: "" (none ran), started, finished, failed, interrupted
	Steps     []Step
	Keys      map[string][]string // lines of authorized_keys that came from metadata, by user
	HostKeys  []string            // "TYPE SHA256:FINGERPRINT"
}

// Step is one thing that is done once per instance.
type Step struct {
	Name  string
	State string // started, finished, failed, interrupted
	Time  time.Time
	Note  string
}

// ReadStatus looks; it asks nobody, waits for nobody and changes nothing. Of o
// Root and Run count.
func ReadStatus(o Options) (*Status, error) {
	r, err := newRun(o)
	if err != nil {
		return nil, err
	}
	s := &Status{Instance: r.facts["instance-id"], HostKeys: hostKeys(r.Root)}
	if s.CloudInit, err = inject.CloudInit(r.Root); err != nil {
		return nil, err
	}
	if s.Keys, err = inject.RecordedKeys(r.Root); err != nil {
		return nil, err
	}
	view, err := inject.ReadJournal(r.Root)
	if err != nil {
		return nil, err
	}
	if s.Instance == "" && len(view.Records) > 0 {
		s.Instance = view.Records[len(view.Records)-1].Instance
	}
	for _, rec := range view.Last(s.Instance) {
		s.Steps = append(s.Steps, Step{Name: rec.Step, State: string(rec.State), Time: rec.Time, Note: rec.Note})
		if rec.Step == userdata.Step {
			s.UserData = string(rec.State)
		}
	}
	return s, nil
}

// hostKeys are the fingerprints of the root's SSH host keys; what is no key is
// left aside.
func hostKeys(root string) []string {
	names, err := filepath.Glob(filepath.Join(root, "etc/ssh/ssh_host_*_key.pub"))
	if err != nil {
		return nil
	}
	slices.Sort(names)
	var out []string
	for _, n := range names {
		data, err := os.ReadFile(n)
		if err != nil {
			continue
		}
		if key, _, _, _, err := ssh.ParseAuthorizedKey(data); err == nil {
			out = append(out, key.Type()+" "+ssh.FingerprintSHA256(key))
		}
	}
	return out
}
