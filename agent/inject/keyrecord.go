package inject

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/inroot"
)

const keyRecordFile = "/var/lib/instar/keys"

// keyRecord remembers which lines of authorized_keys came from metadata, by
// user: those and no others are withdrawn when metadata has them no more.
//
// A line is recorded before it is written to the key file, and then only if
// the file had no such key; it is forgotten after it is removed. So after a
// crash the record may name a line that is not in the file, never the reverse.
type keyRecord struct {
	Users map[string][]string `json:"users"`
}

// RecordedKeys are the keys that Instar wrote for metadata to the
// authorized_keys of users of the root directory, by user.
func RecordedKeys(root string) (map[string][]string, error) {
	r, err := inroot.Open(root)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	rec, err := (&hierarchy{r}).readKeyRecord()
	return rec.Users, err
}

// readKeyRecord reads the record; that there is none is no error.
func (h *hierarchy) readKeyRecord() (keyRecord, error) {
	rec := keyRecord{Users: map[string][]string{}}
	data, err := h.ReadFile(keyRecordFile)
	if errors.Is(err, fs.ErrNotExist) {
		return rec, nil
	}
	if err != nil {
		return rec, fmt.Errorf("reading which keys came from metadata: %w", err)
	}
	read, err := parseKeyRecord(data)
	if err != nil {
		return rec, fmt.Errorf("reading which keys came from metadata: %s: %w", keyRecordFile, err)
	}
	return read, nil
}

func parseKeyRecord(data []byte) (keyRecord, error) {
	var rec keyRecord
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&rec); err != nil {
		return keyRecord{}, err
	}
	if dec.More() {
		return keyRecord{}, errors.New("more than one document")
	}
	for user, lines := range rec.Users {
		if err := CheckUser(user); err != nil {
			return keyRecord{}, err
		}
		for _, l := range lines {
			if err := CheckKey(l, false); err != nil {
				return keyRecord{}, fmt.Errorf("of user %s: %w", user, err)
			}
		}
	}
	if rec.Users == nil {
		rec.Users = map[string][]string{}
	}
	return rec, nil
}

func (h *hierarchy) writeKeyRecord(rec keyRecord) error {
	data, err := json.MarshalIndent(rec, "", "  ")
	if err == nil {
		err = h.WriteFile(keyRecordFile, append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("recording which keys came from metadata: %w", err)
	}
	return nil
}

// keySync brings authorized_keys in step with metadata.
type keySync struct {
	h        *hierarchy
	user     string   // the login user
	want     []string // metadata's keys for him
	addOnly  bool     // want is not all that metadata said
	warn     func(string)
	added    int
	withdrew int
}

// run adds the keys wanted to the login user's and then withdraws from every
// user those that were recorded and are wanted no more. If the login user's
// cannot be brought in step, nothing of the others' is withdrawn.
func (s *keySync) run() error {
	if len(s.want) == 0 && !s.h.Exists(keyRecordFile) {
		return nil
	}
	if err := s.h.Mkdir("/var/lib/instar", 0o700); err != nil {
		return fmt.Errorf("making the directory for what came from metadata: %w", err)
	}
	dir, err := s.h.OpenDir("/var/lib/instar")
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := ownedByRoot(dir); err != nil {
		return err
	}
	// The directory is the lock; the journal has one of its own, on its file.
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("locking %s: %w", dir.Name(), err)
	}
	rec, err := s.h.readKeyRecord()
	if err != nil {
		// Adding needs no record; what it named can no longer be withdrawn.
		s.warn(fmt.Sprintf("%v; a new record is begun and keys of the old one stay", err))
	}
	// The login user comes first: where he cannot get his keys, as when his name
	// is mistyped, those of the others may be the only way in.
	if err := s.one(&rec, s.user, s.want); err != nil {
		return fmt.Errorf("%w; no key of another user is withdrawn", err)
	}
	var errs []error
	for _, u := range slices.Sorted(maps.Keys(rec.Users)) {
		if u == s.user {
			continue
		}
		if err := s.one(&rec, u, nil); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// one does it for one user.
func (s *keySync) one(rec *keyRecord, user string, want []string) error {
	wanted := make(map[string]bool)
	for _, l := range want {
		wanted[keyOf(l)] = true
	}
	var stay, withdraw []string
	for _, l := range rec.Users[user] {
		if wanted[keyOf(l)] || s.addOnly {
			stay = append(stay, l)
		} else {
			withdraw = append(withdraw, l)
		}
	}
	e := keyEdit{user: user, add: want, remove: withdraw, dry: true}
	look, err := s.h.editKeys(e, s.warn)
	if errors.Is(err, errNoUser) && len(want) == 0 {
		s.warn(fmt.Sprintf("user %s, who had keys from metadata, is no more", user))
		delete(rec.Users, user)
		return s.h.writeKeyRecord(*rec)
	}
	if err != nil {
		return err
	}
	ours := slices.Clone(stay)
	for _, l := range look.added {
		if !slices.ContainsFunc(ours, func(o string) bool { return keyOf(o) == keyOf(l) }) {
			ours = append(ours, l)
		}
	}
	if len(ours) > len(stay) {
		rec.Users[user] = append(slices.Clone(ours), withdraw...)
		if err := s.h.writeKeyRecord(*rec); err != nil {
			return err
		}
	}
	if len(look.added) > 0 || look.removed > 0 {
		e.dry = false
		done, err := s.h.editKeys(e, s.warn)
		if err != nil {
			return err
		}
		s.added += len(done.added)
		s.withdrew += done.removed
	}
	if len(withdraw) == 0 {
		return nil
	}
	rec.Users[user] = ours
	if len(ours) == 0 {
		delete(rec.Users, user)
	}
	return s.h.writeKeyRecord(*rec)
}

// keys brings the login user's keys in step with metadata.
func (a *application) keys() error {
	if a.res.CloudInit {
		return nil
	}
	user := a.in.User
	if user == "" {
		user = "root"
	}
	s := keySync{h: a.h, user: user, want: a.in.Keys, addOnly: a.refused, warn: func(s string) { a.say(true, "%s", s) }}
	err := s.run()
	a.res.KeysAdded, a.res.KeysWithdrawn = s.added, s.withdrew
	if err == nil && len(a.in.Keys) > 0 {
		a.say(false, "%d SSH keys for user %s, %d of them new", len(a.in.Keys), user, s.added)
	}
	if s.withdrew > 0 {
		a.say(false, "%d SSH keys withdrawn that metadata has no more", s.withdrew)
	}
	return err
}
