package orders

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/internal/durable"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// record is what is remembered of a request, from before it is taken until it
// can come back no more: without it nothing would keep a request that was put
// back into the store from being done again.
type record struct {
	Version int           `json:"version"` // 1
	Order   tasks.Request `json:"order"`
	// Agent is what the task is taken by; no other taking has the same.
	Agent string `json:"agent"`
	// Request is what the agent is given.
	Request task.Request `json:"request"`
	Stage   stage        `json:"stage"`
	Task    string       `json:"task,omitempty"` // of the agent
	// Last is what is to be said at the end.
	Last *tasks.Status `json:"last,omitempty"`
}

// stage is how far a request is. On disk first, then done.
type stage string

const (
	taking stage = "taking" // whether the task is ours is what its status says
	taken  stage = "taken"  // it is; the agent has it, or will
	ended  stage = "ended"  // nothing is left to do but to say so
	told   stage = "told"   // and it is said
)

// maxRecord bounds a record, in bytes.
const maxRecord = 256 << 10

var recordName = regexp.MustCompile(`^((bun|img)-[0-9a-f]{17})\.json$`)

// journal is the directory of the records.
type journal string

func openJournal(path string) (journal, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return "", fmt.Errorf("making the directory of a catalog's tasks: %w", err)
	}
	return journal(path), durable.SyncDir(filepath.Dir(path))
}

// load reads all records. One that cannot be read is an error: what was done is
// not known without it.
func (j journal) load() (map[string]*record, error) {
	names, err := os.ReadDir(string(j))
	if err != nil {
		return nil, fmt.Errorf("reading what is remembered of a catalog's tasks: %w", err)
	}
	all := make(map[string]*record)
	for _, n := range names {
		m := recordName.FindStringSubmatch(n.Name())
		if m == nil {
			if strings.HasPrefix(n.Name(), durable.Temp) { // of a crash
				if err := os.Remove(filepath.Join(string(j), n.Name())); err != nil {
					return nil, fmt.Errorf("removing what a crash left: %w", err)
				}
			}
			continue
		}
		r, err := j.read(n.Name())
		if err == nil && (r.Order.ID != m[1] || r.Version != 1) {
			err = fmt.Errorf("it is version %d of the record of %q", r.Version, r.Order.ID)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: what is remembered of a catalog's task cannot be read; if you remove it, the task may be done again: %w", filepath.Join(string(j), n.Name()), err)
		}
		all[m[1]] = r
	}
	return all, nil
}

func (j journal) read(name string) (*record, error) {
	data, err := durable.Read(filepath.Join(string(j), name), maxRecord)
	if err != nil {
		return nil, err
	}
	var r record
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return nil, err
	}
	return &r, nil
}

// save puts a record on disk, whole or not at all.
func (j journal) save(r *record) error {
	data, err := json.Marshal(r)
	if err == nil {
		err = durable.Replace(filepath.Join(string(j), r.Order.ID+".json"), 0o600, append(data, '\n'))
	}
	if err != nil {
		return fmt.Errorf("remembering the catalog's task %s: %w", r.Order.ID, err)
	}
	return nil
}

func (j journal) remove(id string) error {
	err := os.Remove(filepath.Join(string(j), id+".json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forgetting the catalog's task %s: %w", id, err)
	}
	return durable.SyncDir(string(j))
}
