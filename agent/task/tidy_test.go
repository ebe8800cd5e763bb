package task_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/internal/durable"
)

// TestTidy: what a crash left goes, what a worker is writing stays.
func TestTidy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks")
	dir, err := task.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	young, old, other := filepath.Join(path, durable.Temp+"1"), filepath.Join(path, durable.Temp+"2"), filepath.Join(path, "bun-0123456789abcdef0.log")
	then := time.Now().Add(-2 * time.Hour)
	for _, f := range []string{young, old, other} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if f == young {
			continue
		}
		if err := os.Chtimes(f, then, then); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := task.OpenDir(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(old); err != nil {
		t.Errorf("another agent tidied before it was known to be alone: %v", err)
	}
	if err := dir.Tidy(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{young, other} {
		if _, err := os.Lstat(f); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(old); err == nil {
		t.Error("what a crash left is still there")
	}
}
