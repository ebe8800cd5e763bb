package catalog

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/loopfs"
)

// machine is one with an agent that takes what the catalog asks.
type machine struct {
	w *world
	folder
	volume string
	// The instance it says it is, and what the catalog may ask for.
	instance, from string

	client *server.Client
	cmd    *exec.Cmd
}

// newMachine makes a machine that says it is an instance and lets the catalog ask
// for what from says. Its agent is not running yet.
func (w *world) newMachine(t *testing.T, instance, from string) *machine {
	t.Helper()
	m := &machine{w: w, folder: folder{t.TempDir()}, instance: instance, from: from}
	m.volume = filepath.Join(m.dir, "volume")
	for _, d := range []string{"etc", "tmp", "volume/etc", "volume/home"} {
		if err := os.MkdirAll(filepath.Join(m.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	loopfs.Run(t, "sh", "-euc", `cd "$1"; head -c 5000000 /dev/urandom >home/data; echo "$2" >etc/hostname; ln -s data home/link; chmod 4750 etc/hostname; truncate -s 1M home/sparse`, "sh", m.volume, instance)
	w.account(t, instance)
	m.write(t, "etc/s3.secret", machineSecret(instance)+"\n")
	m.write(t, "etc/config.yaml", fmt.Sprintf("endpoint: %s\nregion: %s\naccess_key_id: %s\nsecret_key_file: %s\nprivate_key: %s\ncertificate: %s\nec2_cert: %s\naccount_id: %q\nsigning_key: %s\nidentity: %s\n",
		w.minio.Endpoint, w.minio.Region, instance, m.path("etc/s3.secret"), w.Keys.UserKey, w.Keys.UserCert, w.Keys.CloudPK, alice, w.path("machine"), w.path("identity")))
	signers, err := os.ReadFile(w.path("machine-signers"))
	if err != nil {
		t.Fatal(err)
	}
	m.write(t, "etc/allowed_signers", string(signers))
	m.client = server.NewClient(m.path("agent.sock"))
	t.Cleanup(func() { m.end(t) })
	return m
}

// machineSecret is the secret of a machine's S3 credentials, whose key is its instance's id.
func machineSecret(instance string) string { return "the secret of " + instance }

// account makes a machine's S3 credentials, that may what docs/agent.md says.
func (w *world) account(t *testing.T, instance string) {
	t.Helper()
	manual, err := os.ReadFile("../../docs/agent.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(manual), "```json\n{\"Version\"")
	policy, _, end := strings.Cut(rest, "```")
	if !ok || !end {
		t.Fatal("docs/agent.md has no policy")
	}
	policy = strings.NewReplacer("i-0123456789abcdef0", instance, "arn:aws:s3:::images", "arn:aws:s3:::"+w.bucket).Replace(`{"Version"` + policy)
	w.minio.AddPolicy(t, instance, policy)
	w.minio.AddUser(t, instance, machineSecret(instance))
	w.minio.Attach(t, instance, instance, false)
}

func (m *machine) env() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + m.dir, "INSTAR_ETC=" + m.path("etc"), "INSTAR_STATE=" + m.path("state"), "TMPDIR=" + m.path("tmp"), "AWS_EC2_METADATA_DISABLED=true"}
}

// run starts the agent, whose captures send so many bytes a second; 0 is no limit.
func (m *machine) run(t *testing.T, rate int) *machine {
	t.Helper()
	m.write(t, "etc/agent.yaml", fmt.Sprintf("limits: {upload-rate: %d, foreground: true}\ntasks-from:\n  store: %s\n  instance: %s\n  interval: 1s\n  volume: %s\n  no-kernel: true\n%s",
		rate, m.w.store(m.w.bucket), m.instance, m.volume, m.from))
	log, err := os.OpenFile(m.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	m.cmd = exec.Command(m.w.Program, "agent", "run", "--socket", m.path("agent.sock"), "--state", m.path("agent"), "--launcher", "child")
	m.cmd.Env, m.cmd.Stderr = m.env(), log
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.await(t, "the agent answers", func() bool { return m.client.Alive(t.Context()) == nil })
	return m
}

// kill kills the agent.
func (m *machine) kill(t *testing.T) {
	t.Helper()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = m.cmd.Wait()
}

// killWorkers kills the captures that go on.
func (m *machine) killWorkers(t *testing.T) {
	t.Helper()
	dir := task.Dir(m.path("agent/tasks"))
	all, _, err := dir.LoadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range all {
		if pid, err := dir.Worker(x.ID); err == nil && pid > 0 {
			if err := unix.Kill(-pid, unix.SIGKILL); err != nil {
				t.Error(err)
			}
		}
	}
}

// end ends the agent, and what goes on without it.
func (m *machine) end(t *testing.T) {
	if m.cmd == nil {
		return
	}
	if m.cmd.ProcessState == nil {
		_ = m.cmd.Process.Signal(unix.SIGTERM)
		_ = m.cmd.Wait()
	}
	m.killWorkers(t)
	if t.Failed() {
		t.Logf("the agent's log:\n%s", tail(m.log(t)))
	}
}

func (m *machine) log(t *testing.T) string {
	data, err := os.ReadFile(m.path("log"))
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

func (m *machine) tasks(t *testing.T) []task.Task {
	t.Helper()
	all, err := m.client.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func (m *machine) await(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
	}
}

// reads waits until the machine's capture has sent some of what it reads.
func (m *machine) reads(t *testing.T) {
	t.Helper()
	m.await(t, "a capture reads", func() bool {
		for _, x := range m.tasks(t) {
			if !x.State.Ended() && x.Progress.Percent > 10 {
				return true
			}
		}
		return false
	})
}

// asker is a boto3 that asks the servers, several things at once.
type asker struct {
	in io.WriteCloser

	mu    sync.Mutex
	asked int
	waits map[int]chan answer
}

type (
	params map[string]any
	answer struct {
		N             int
		OK            map[string]json.RawMessage
		Code, Message string
	}
)

func newAsker(t *testing.T, w *world, urls ...string) *asker {
	t.Helper()
	script, err := filepath.Abs("testdata/ask.py")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/bin/python3", script)
	cmd.Env, cmd.Dir, cmd.Stderr = w.clean("INSTAR_URLS="+strings.Join(urls, " ")), w.dir, os.Stderr
	a := &asker{waits: make(map[int]chan answer)}
	if a.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for dec := json.NewDecoder(out); ; {
			var got answer
			err := dec.Decode(&got)
			a.mu.Lock()
			if err != nil { // nothing more comes
				for _, c := range a.waits {
					close(c)
				}
				a.waits = nil
				a.mu.Unlock()
				return
			}
			a.waits[got.N] <- got
			delete(a.waits, got.N)
			a.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		a.in.Close()
		wg.Wait()
		_ = cmd.Wait()
	})
	return a
}

func (a *asker) ask(t *testing.T, what params) answer {
	t.Helper()
	c := make(chan answer, 1)
	a.mu.Lock()
	if a.waits == nil {
		a.mu.Unlock()
		t.Fatal("boto3 has ended")
	}
	a.asked++
	what["n"] = a.asked
	line, err := json.Marshal(what)
	if err == nil {
		a.waits[a.asked] = c
		_, err = a.in.Write(append(line, '\n'))
	}
	a.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	out, ok := <-c
	if !ok {
		t.Fatalf("%s: boto3 has ended", line)
	}
	return out
}

// want asks for something that must succeed, and reads a member of the answer.
func (a *asker) want(t *testing.T, what params, member string, into any) {
	t.Helper()
	out := a.ask(t, what)
	if out.Code != "" {
		t.Fatalf("%v: %s: %s", what, out.Code, out.Message)
	}
	if member == "" {
		return
	}
	if err := json.Unmarshal(out.OK[member], into); err != nil {
		t.Fatalf("%v: %s: %v", what, out.OK[member], err)
	}
}

// bundleTask is what DescribeBundleTasks tells.
type bundleTask struct {
	BundleId        string
	State, Progress string
	BundleTaskError struct{ Code, Message string }
}

// bundling asks for a bundle and returns its task's id.
func (a *asker) bundling(t *testing.T, instance, bucket, prefix string) string {
	t.Helper()
	var b bundleTask
	a.want(t, params{"op": "bundle_instance", "params": params{"InstanceId": instance, "Storage": params{"S3": params{"Bucket": bucket, "Prefix": prefix}}}}, "BundleTask", &b)
	return b.BundleId
}

func (a *asker) describe(t *testing.T, id string) bundleTask {
	t.Helper()
	var all []bundleTask
	a.want(t, params{"op": "describe_bundle_tasks", "params": params{"BundleIds": []string{id}}}, "BundleTasks", &all)
	if len(all) != 1 {
		t.Fatalf("%d tasks are %s", len(all), id)
	}
	return all[0]
}

// ends waits for the end of a bundle task.
func (a *asker) ends(t *testing.T, m *machine, id string) bundleTask {
	t.Helper()
	var b bundleTask
	m.await(t, "the bundle task ends", func() bool {
		b = a.describe(t, id)
		return b.State == "complete" || b.State == "failed"
	})
	return b
}

// image makes an image of an instance and returns its id.
func (a *asker) image(t *testing.T, instance, name string) string {
	t.Helper()
	var id string
	a.want(t, params{"op": "create_image", "params": params{"InstanceId": instance, "Name": name, "NoReboot": true}}, "ImageId", &id)
	return id
}

// available waits until an image of an instance is, and returns where it lies.
func (a *asker) available(t *testing.T, instance, id string) string {
	t.Helper()
	a.want(t, params{"wait": "image_available", "params": params{"ImageIds": []string{id}}}, "", nil)
	var all []struct{ State, ImageLocation string }
	a.want(t, params{"op": "describe_images", "params": params{"ImageIds": []string{id}}}, "Images", &all)
	if len(all) != 1 || all[0].State != "available" || !strings.HasPrefix(all[0].ImageLocation, instance+"@") {
		t.Fatalf("the image %s is %+v", id, all)
	}
	return all[0].ImageLocation
}
