package main

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/instar-image/instar/agent/task"
)

// TestWorkerReadShare: a capture for which something stands still is not gentle,
// unless it is asked to be.
func TestWorkerReadShare(t *testing.T) {
	still := &task.Quiesce{Stop: []string{"app.service"}}
	for _, c := range []struct {
		name    string
		request task.Request
		want    bool
	}{
		{"nothing stands still", task.Request{}, true},
		{"an empty list", task.Request{Quiesce: &task.Quiesce{}}, true},
		{"a unit does", task.Request{Quiesce: still}, false},
		{"and it is to be gentle all the same", task.Request{Quiesce: still, Limits: &task.Limits{ReadShare: 25}}, true},
	} {
		c.request.Kind, c.request.Name, c.request.Store, c.request.Volume = task.CreateImage, "web", "/srv/store", "/srv/data"
		dir := t.TempDir()
		env := func(name string) string {
			return map[string]string{"INSTAR_ETC": filepath.Join(dir, "etc"), "HOME": dir}[name]
		}
		a := newApp([]string{"instar"}, nil, nil, nil, env)
		w := &worker{a: a, o: &agentWorkOptions{readShare: 25, settings: filepath.Join(dir, "none.yaml")}, t: &task.Task{Request: c.request}}
		args, err := w.args()
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(args, "--read-share=25"); got != c.want {
			t.Errorf("%s: %q", c.name, args)
		}
	}
}
