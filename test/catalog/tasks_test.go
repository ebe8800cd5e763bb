package catalog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// taskWorld is a MinIO with a catalog, served by two servers, whose machines are
// believed under names that begin with i-.
type taskWorld struct {
	*world
	*asker
	killFirst func()
}

func newTaskWorld(t *testing.T) *taskWorld {
	t.Helper()
	w := &taskWorld{world: prepare(t)}
	loopfs.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", w.path("machine"))
	public := func(name string) string {
		data, err := os.ReadFile(w.path(name + ".pub"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	// The catalog's key says what is to be done, the machines' what they have made.
	lines := `* namespaces="instar-catalog,instar-task" ` + public("key") +
		`i-* namespaces="instar-image,instar-head" ` + public("machine") + `default namespaces="instar-domain" ` + public("machine")
	if _, err := keys.WriteIdentity(w.path("identity"), time.Now()); err != nil { // of all of them, who share a domain
		t.Fatal(err)
	}
	w.write(t, "signers", lines)
	w.write(t, "machine-signers", strings.Replace(lines, "* namespaces=\"instar-catalog,", "i-* namespaces=\"", 1))
	var urls [2]string
	urls[0], w.killFirst = w.killable(t, w.bucket)
	urls[1] = w.serve(t, w.bucket)
	w.url = urls[1]
	w.asker = newAsker(t, w.world, urls[1], urls[0])
	return w
}

// aws runs the AWS command line and returns its output.
func (w *taskWorld) aws(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(w.run(t, w.clean(), append([]string{"/usr/bin/aws", "--endpoint-url", w.url, "--output", "text", "ec2"}, args...)...))
}

// same holds an image of a volume to the volume.
func same(t *testing.T, m *machine, image string) {
	t.Helper()
	root := loopfs.Mount(t, image, "ro")
	for _, top := range []string{"etc", "home"} { // beside them are the directories that every root needs
		diffs, err := compare.Trees(filepath.Join(m.volume, top), filepath.Join(root, top), compare.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range diffs {
			t.Errorf("%s: %s: %s", filepath.Base(image), top, d)
		}
	}
}

// restored restores an image of a machine, by its own keys, and compares it.
func (w *taskWorld) restored(t *testing.T, m *machine, location string) {
	t.Helper()
	i := *w.Instar
	i.Env = m.env()
	i.Want(t, instar.OK, "restore", location, "--store", w.store(w.bucket), "--to", m.path("restored.img"))
	same(t, m, m.path("restored.img"))
}

// anything lets bundles go to machines/, and images be made.
const anything = "  bundle-to: [cat-*/machines/*]\n  create-image: true\n"

// Rates at which a capture takes minutes, so that it is met while it reads, and
// some ten seconds.
const (
	slowly = 30000
	soon   = 500000
)

// TestMachines has machines bundled and imaged by the API's clients, from the
// request to what comes back out of it, with processes killed on the way.
func TestMachines(t *testing.T) {
	w := newTaskWorld(t)
	t.Run("machines", func(t *testing.T) {
		t.Run("whole", func(t *testing.T) { t.Parallel(); wholeWay(t, w) })
		t.Run("killed", func(t *testing.T) { t.Parallel(); killedOnTheWay(t, w) })
		t.Run("cancelled", func(t *testing.T) { t.Parallel(); cancelled(t, w) })
		t.Run("two agents", func(t *testing.T) { t.Parallel(); twoAgents(t, w) })
		t.Run("not allowed", func(t *testing.T) { t.Parallel(); notAllowed(t, w) })
	})
}

// wholeWay: what the AWS command line asks for is made, and is what was on the machine.
func wholeWay(t *testing.T, w *taskWorld) {
	m := w.newMachine(t, "i-a1", anything).run(t, 0)
	id := w.aws(t, "bundle-instance", "--instance-id", "i-a1", "--bucket", w.bucket, "--prefix", "machines/web-1", "--owner-akid", "AKALICE", "--owner-sak", "alice-secret-key", "--query", "BundleTask.BundleId")
	image := w.aws(t, "create-image", "--instance-id", "i-a1", "--name", "made of a machine", "--description", "by the command line", "--query", "ImageId")
	w.want(t, params{"wait": "bundle_task_complete", "params": params{"BundleIds": []string{id}}}, "", nil)
	w.aws(t, "wait", "bundle-task-complete", "--bundle-ids", id)
	if got := w.aws(t, "describe-bundle-tasks", "--bundle-ids", id, "--query", "BundleTasks[0].[State,InstanceId,Storage.S3.Prefix]"); got != "complete\ti-a1\tmachines/web-1" {
		t.Errorf("the task is %q", got)
	}
	location := w.available(t, "i-a1", image)

	out := m.path("out")
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	w.Want(t, instar.OK, "download-and-unbundle", "-b", w.bucket+"/machines", "-p", "web-1", "-k", w.Keys.UserKey, "-d", out)
	same(t, m, filepath.Join(out, "web-1"))
	w.restored(t, m, location)
	// A bundle that is there is not replaced by a request.
	if got := w.ends(t, m, w.bundling(t, "i-a1", w.bucket, "machines/web-1")); got.State != "failed" || !strings.Contains(got.BundleTaskError.Message, "is stored already") {
		t.Errorf("the second bundle of that name is %+v", got)
	}
	w.want(t, params{"op": "register_image", "params": params{"Name": "of the bundle", "ImageLocation": w.bucket + "/machines/web-1.manifest.xml"}}, "", nil)
}

// killedOnTheWay: agent, captures and a server are killed while an image and a
// bundle are made.
func killedOnTheWay(t *testing.T, w *taskWorld) {
	m := w.newMachine(t, "i-a2", anything).run(t, slowly)
	image := w.image(t, "i-a2", "of a machine that is killed")
	m.reads(t)
	m.kill(t)
	m.killWorkers(t)
	w.killFirst() // of two servers; the other goes on where it was
	m.run(t, soon)
	location := w.available(t, "i-a2", image)
	if all := m.tasks(t); len(all) != 1 || len(all[0].Attempts) != 2 {
		t.Errorf("the agent's tasks are %+v", all)
	}
	w.restored(t, m, location)

	// The agent alone: the capture goes on without it.
	id := w.bundling(t, "i-a2", w.bucket, "machines/web-2")
	m.reads(t)
	m.kill(t)
	m.run(t, slowly)
	if got := w.ends(t, m, id); got.State != "complete" {
		t.Errorf("the bundle is %+v", got)
	}
	// The capture alone: a bundle is not begun again.
	id = w.bundling(t, "i-a2", w.bucket, "machines/web-3")
	m.reads(t)
	m.killWorkers(t)
	if got := w.ends(t, m, id); got.State != "failed" || got.BundleTaskError.Code != task.CodeInterrupted {
		t.Errorf("the bundle whose capture was killed is %+v", got)
	}
	if all := m.tasks(t); len(all) != 3 {
		t.Errorf("the agent had %d tasks, want 3", len(all))
	}
}

// cancelled: a bundle that is being made, and one that nobody took, are cancelled.
func cancelled(t *testing.T, w *taskWorld) {
	m := w.newMachine(t, "i-a3", anything).run(t, slowly)
	id := w.bundling(t, "i-a3", w.bucket, "machines/web-4")
	m.reads(t)
	if got := w.aws(t, "cancel-bundle-task", "--bundle-id", id, "--query", "BundleTask.State"); got != "cancelling" {
		t.Errorf("cancelled it is %q", got)
	}
	if got := w.ends(t, m, id); got.State != "failed" || got.BundleTaskError.Code != "Client.Cancelled" {
		t.Errorf("in the end it is %+v", got)
	}
	if all := m.tasks(t); len(all) != 1 || all[0].State != task.Cancelled {
		t.Errorf("the agent's tasks are %+v", all)
	}
	for _, k := range w.minio.Keys(t, w.bucket) {
		if strings.Contains(k, "web-4.manifest") {
			t.Errorf("%s is there", k)
		}
	}
	if out := w.ask(t, params{"wait": "bundle_task_complete", "params": params{"BundleIds": []string{id}}}); out.Code != "WaiterError" {
		t.Errorf("the waiter says %+v", out)
	}

	// An instance without an agent: nobody touches what is asked of it.
	id = w.bundling(t, "i-a999", w.bucket, "machines/none")
	key := "fleet/catalog/tasks/i-a999/" + id + "/status"
	before := string(w.minio.Get(t, w.bucket, key))
	next := w.bundling(t, "i-a3", w.bucket, "machines/web-5")
	m.reads(t)
	if after := string(w.minio.Get(t, w.bucket, key)); after != before || w.describe(t, id).State != "pending" {
		t.Errorf("the status was %s and is %s", before, after)
	}
	for _, id := range []string{id, next} {
		w.want(t, params{"op": "cancel_bundle_task", "params": params{"BundleId": id}}, "", nil)
	}
	if got := w.describe(t, id); got.State != "failed" || got.BundleTaskError.Code != "Client.Cancelled" {
		t.Errorf("what nobody took is %+v", got)
	}

	// An image that is deregistered before it is there: its capture ends.
	if got := w.ends(t, m, next); got.State != "failed" {
		t.Errorf("the next is %+v", got)
	}
	image := w.image(t, "i-a3", "not wanted any more")
	m.reads(t)
	w.want(t, params{"op": "deregister_image", "params": params{"ImageId": image}}, "", nil)
	m.await(t, "the image's capture is cancelled", func() bool {
		all := m.tasks(t)
		return all[len(all)-1].Request.Kind == task.CreateImage && all[len(all)-1].State == task.Cancelled
	})
}

// twoAgents: two machines that say they are the same instance share its tasks.
func twoAgents(t *testing.T, w *taskWorld) {
	var both []*machine
	for range 2 {
		both = append(both, w.newMachine(t, "i-a4", "  create-image: true\n").run(t, 0))
	}
	const n = 4
	var ids []string
	for i := range n {
		ids = append(ids, w.image(t, "i-a4", fmt.Sprintf("shared %d", i)))
	}
	for _, id := range ids {
		w.available(t, "i-a4", id)
	}
	if a, b := len(both[0].tasks(t)), len(both[1].tasks(t)); a+b != n {
		t.Errorf("they did %d and %d, want %d in all", a, b, n)
	}
}

// notAllowed: what the machine's settings do not allow is refused and told; what is
// not the server's word is not followed, and told on the machine.
func notAllowed(t *testing.T, w *taskWorld) {
	m := w.newMachine(t, "i-a5", "  bundle-to: [cat-*/machines/*]\n")
	store, err := upload.Open(t.Context(), w.store(w.bucket), upload.Options{
		Endpoint: w.minio.Endpoint, Region: w.minio.Region, Credentials: &upload.Credentials{AccessKeyID: w.minio.AccessKey, SecretAccessKey: w.minio.SecretKey},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	stranger, err := keys.WriteSigningKey(m.path("stranger"), "")
	if err != nil {
		t.Fatal(err)
	}
	signers, err := os.ReadFile(m.path("etc/allowed_signers"))
	if err != nil {
		t.Fatal(err)
	}
	// He is believed for images, by a line that names no purpose.
	m.write(t, "etc/allowed_signers", string(signers)+keys.AllowedSigner{Principals: "*", Key: stranger.Public()}.String()+"\n")
	// Whoever may write the bucket writes what he can.
	forged, err := tasks.Open(tasks.Options{Store: store, Signer: stranger}).Submit(t.Context(), tasks.Request{
		Kind: tasks.BundleInstance, Instance: "i-a5", Account: alice, Bucket: w.bucket, Prefix: "machines/forged",
	})
	if err != nil {
		t.Fatal(err)
	}
	// A machine's own credentials do not reach so far.
	its, err := upload.Open(t.Context(), w.store(w.bucket), upload.Options{
		Endpoint: w.minio.Endpoint, Region: w.minio.Region, Credentials: &upload.Credentials{AccessKeyID: "i-a5", SecretAccessKey: machineSecret("i-a5")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { its.Close() })
	for _, key := range []string{"catalog/head", tasks.Prefix + "i-a5/" + forged.ID + "/request", tasks.Prefix + "i-a1/" + forged.ID + "/status", "images/i-a1/head"} {
		if _, err := upload.PutBytes(t.Context(), its, key, []byte("x"), upload.PutOptions{}); !errors.Is(err, upload.ErrAccess) {
			t.Errorf("the machine writes %s: %v", key, err)
		}
	}
	folder := "fleet/catalog/tasks/i-a5/"
	w.minio.Put(t, w.bucket, folder+"bun-00000000000000000/request", []byte(strings.Repeat("x", 1<<20)))
	elsewhere := w.bundling(t, "i-a998", w.bucket, "machines/moved")
	for _, o := range []string{"/request", "/status"} {
		w.minio.Put(t, w.bucket, folder+elsewhere+o, w.minio.Get(t, w.bucket, "fleet/catalog/tasks/i-a998/"+elsewhere+o))
	}

	m.run(t, 0)
	id := w.bundling(t, "i-a5", w.bucket, "secret/web") // the account may, the machine will not
	got := w.ends(t, m, id)
	if got.State != "failed" || got.BundleTaskError.Code != "Client.NotPermitted" || !strings.Contains(got.BundleTaskError.Message, "secret/web") {
		t.Errorf("a bundle to where none may go: %+v", got)
	}
	image := w.image(t, "i-a5", "that may not be")
	if out := w.ask(t, params{"wait": "image_available", "params": params{"ImageIds": []string{image}}}); out.Code != "WaiterError" {
		t.Errorf("the waiter says %+v", out)
	}
	var all []struct {
		State       string
		StateReason struct{ Code, Message string }
	}
	w.want(t, params{"op": "describe_images", "params": params{"ImageIds": []string{image}}}, "Images", &all)
	if all[0].State != "failed" || all[0].StateReason.Code != "Client.NotPermitted" {
		t.Errorf("an image that may not be made: %+v", all)
	}
	if got := w.ends(t, m, w.bundling(t, "i-a5", w.bucket, "machines/web-6")); got.State != "complete" {
		t.Errorf("a bundle to where they may go: %+v", got)
	}
	if n := len(m.tasks(t)); n != 1 {
		t.Errorf("the agent had %d tasks, want 1", n)
	}
	told := map[string]int{}
	for line := range strings.Lines(m.log(t)) {
		for _, of := range []string{forged.ID, "bun-00000000000000000", elsewhere} {
			if strings.Contains(line, of) && strings.Contains(line, "not followed") {
				told[of]++
			}
		}
	}
	if len(told) != 3 || told[forged.ID] != 1 || told[elsewhere] != 1 || told["bun-00000000000000000"] != 1 {
		t.Errorf("the log tells, how often, of %v", told)
	}
	for _, of := range []string{forged.ID, elsewhere} {
		if s := string(w.minio.Get(t, w.bucket, folder+of+"/status")); !strings.Contains(s, `"pending"`) {
			t.Errorf("the status of %s is %s", of, s)
		}
	}
	// Put back when it is over, a request is not done again.
	done := w.bundling(t, "i-a5", w.bucket, "machines/web-7")
	pending := w.minio.Get(t, w.bucket, folder+done+"/status")
	if !strings.Contains(string(pending), `"pending"`) {
		pending = []byte(fmt.Sprintf(`{"state":"pending","progress":0,"updated":%q}`, time.Now().UTC().Format(time.RFC3339)))
	}
	w.ends(t, m, done)
	w.minio.Put(t, w.bucket, folder+done+"/status", pending)
	m.await(t, "the agent says that it was put back", func() bool { return strings.Contains(m.log(t), "somebody put it back") })
	if n := len(m.tasks(t)); n != 2 {
		t.Errorf("the agent had %d tasks, want 2", n)
	}
}
