package tasks

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/test/fakesystemd"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// TestOrdersUnit: under systemd a unit of its own looks for a catalog's requests,
// for the agent reaches no network. It is there as long as the agent is, has the
// credential and no more, and what it takes the agent does.
func TestOrdersUnit(t *testing.T) {
	s := fakesystemd.Start(t)
	h := newHost(t, "--launcher", "systemd")
	h.kill()
	at := func(name string) string { return filepath.Join(h.top, name) }
	must(t, os.Mkdir(at("catalog"), 0o700))
	store, err := upload.OpenDir(at("catalog"), false)
	must(t, err)
	t.Cleanup(func() { store.Close() })
	signer, err := keys.WriteSigningKey(at("server"), "")
	must(t, err)
	must(t, os.WriteFile(at("signers"), []byte(keys.AllowedSigner{Principals: "i-1", Namespaces: tasks.Namespace, Key: signer.Public()}.String()+"\n"), 0o600))
	must(t, os.WriteFile(at("etc/agent.yaml"), fmt.Appendf(nil, "secret-key-file: %s\ntasks-from: {store: %s, instance: i-1, interval: 1s, signers: %s, create-image: true, volume: %s, no-kernel: true}\n",
		at("etc/secret"), at("catalog"), at("signers"), at("vol")), 0o600))
	server := tasks.Open(tasks.Options{Store: store, Signer: signer})
	ask := func() string {
		t.Helper()
		asked, err := server.Submit(t.Context(), tasks.Request{Kind: tasks.CreateImage, Instance: "i-1", Account: "111122223333", ImageID: "ami-00000000000000000", Name: "i-1"})
		must(t, err)
		return asked.ID
	}
	completes := func(id string) {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(100 * time.Millisecond) {
			now, err := server.Get(t.Context(), "i-1", id)
			must(t, err)
			if now.State.Ended() {
				if now.State != tasks.Complete || !strings.HasPrefix(now.Manifest, "i-1@") {
					t.Fatalf("%+v", now.Status)
				}
				return
			}
			if time.Since(begun) > 5*time.Minute {
				t.Fatalf("it does not end: %+v", now.Status)
			}
		}
	}
	runs := func() bool { return s.PID(systemd.OrdersUnit) != 0 }
	h.run()
	completes(ask())
	for property, want := range map[string]string{"ProtectSystem": "strict", "CapabilityBoundingSet": "0", "PartOf": systemd.AgentService, "LoadCredential": at("etc/secret"), "ReadWritePaths": at("agent")} {
		if got := fmt.Sprint(s.Property(systemd.OrdersUnit, property)); !strings.Contains(got, want) {
			t.Errorf("%s is %s, want %s", property, got, want)
		}
	}
	first := s.PID(systemd.OrdersUnit)

	// The agent is killed: the next one starts the unit anew.
	h.kill()
	id := ask()
	h.run()
	completes(id)
	if now := s.PID(systemd.OrdersUnit); now == 0 || now == first {
		t.Errorf("the unit's process was %d and is %d", first, now)
	}
	all, err := h.client.List(t.Context())
	must(t, err)
	if len(all) != 2 || all[0].State != task.Complete || all[1].State != task.Complete {
		t.Errorf("the agent's tasks are %+v", all)
	}
	// It is told to end, and the unit ends.
	must(t, h.cmd.Process.Signal(unix.SIGTERM))
	must(t, h.cmd.Wait())
	soon(t, "the unit ends with the agent", func() bool { return !runs() })
}
