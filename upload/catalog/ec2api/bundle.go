package ec2api

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

type bundleInstance struct {
	dry
	InstanceID string `q:"InstanceId!"`
	Storage    struct {
		S3 struct {
			Bucket                string
			Prefix                string
			AWSAccessKeyID        string `q:"AWSAccessKeyId"`
			UploadPolicy          blob
			UploadPolicySignature string
		}
	}
}

type bundleTaskItem struct {
	InstanceID string           `xml:"instanceId"`
	BundleID   string           `xml:"bundleId"`
	State      string           `xml:"state"`
	StartTime  string           `xml:"startTime"`
	UpdateTime string           `xml:"updateTime"`
	Storage    storageItem      `xml:"storage"`
	Progress   string           `xml:"progress,omitempty"`
	Error      *bundleTaskError `xml:"error"`
}

type storageItem struct {
	S3 struct {
		Bucket string `xml:"bucket"`
		Prefix string `xml:"prefix"`
	} `xml:"S3"`
}

type bundleTaskError struct {
	Code    string `xml:"code"`
	Message string `xml:"message"`
}

type bundleTaskReply struct {
	head
	BundleInstanceTask bundleTaskItem `xml:"bundleInstanceTask"`
}

func newBundleTask(t *tasks.Task) bundleTaskItem {
	i := bundleTaskItem{InstanceID: t.Instance, BundleID: t.ID, State: string(t.State), StartTime: timestamp(t.Created), UpdateTime: timestamp(t.Updated)}
	i.Storage.S3.Bucket, i.Storage.S3.Prefix = t.Bucket, t.Prefix
	if !t.State.Ended() && t.State != tasks.Pending {
		i.Progress = percent(t.Progress)
	}
	if t.State == tasks.Cancelled || t.State == tasks.Failed { // EC2 has no state for cancelled
		i.State = string(tasks.Failed)
		i.Error = &bundleTaskError{t.Code, t.Message}
		if t.State == tasks.Cancelled {
			i.Error.Code = "Client.Cancelled"
		}
		if i.Error.Code == "" {
			i.Error.Code = "Server.InternalError"
		}
	}
	return i
}

// taskable makes sure that an instance can be asked by the caller. One of
// somebody else is one that does not exist.
func (s *Server) taskable(c *call, instance string) error {
	if !tasks.ValidInstance(instance) {
		return refuse(codeInstanceMalformed, "Invalid id: \"%.100s\"", instance)
	}
	if s.o.Tasks == nil || !c.account.owns(instance) {
		return refuse(codeInstanceNotFound, "The instance ID '%s' does not exist", instance)
	}
	return nil
}

// manifestSuffix ends the key of a bundle's manifest, behind its prefix.
const manifestSuffix = ".manifest.xml"

// unbundled makes sure that what lies at a location is not about to be replaced by
// a bundle that an agent was asked for.
func (s *Server) unbundled(ctx context.Context, location string) error {
	if s.o.Tasks == nil {
		return nil
	}
	all, err := s.tasksOf(ctx, "")
	if err != nil {
		return err
	}
	for _, t := range all {
		if t.Kind == tasks.BundleInstance && t.Bucket+"/"+t.Prefix+manifestSuffix == location && !t.State.Ended() {
			return refuse(catalog.CodeManifest, "What lies at %.200s is being replaced: an instance is being bundled there", location)
		}
	}
	return nil
}

func (s *Server) bundleInstance(ctx context.Context, c *call, in *bundleInstance) (_ reply, err error) {
	if err := s.taskable(c, in.InstanceID); err != nil {
		return nil, err
	}
	to := in.Storage.S3
	bucket, folder, _ := strings.Cut(strings.Trim(to.Bucket, "/"), "/")
	prefix := strings.TrimPrefix(folder+"/"+strings.TrimPrefix(to.Prefix, "/"), "/")
	switch {
	case bucket == "":
		return nil, missing("Storage.S3.Bucket")
	case to.Prefix == "":
		return nil, missing("Storage.S3.Prefix")
	case catalog.CheckBucket(bucket) != nil:
		return nil, catalog.CheckBucket(bucket)
	case upload.CheckKey(prefix) != nil:
		return nil, refuse(catalog.CodeParameterValue, "value (%.100s) for parameter Storage.S3.Prefix is invalid: it is no beginning of a key", to.Prefix)
	case !c.account.uses(bucket):
		return nil, refuse(catalog.CodeAuthFailure, "Not authorized for images: the account may not have bundles put into the bucket %.100q", bucket)
	}
	end, err := s.checkPolicy(c, to.AWSAccessKeyID, to.UploadPolicy, to.UploadPolicySignature, [2]string{bucket, to.Bucket}, [2]string{prefix, to.Prefix})
	if err != nil {
		return nil, err
	}
	all, err := s.asked(ctx, c, in.InstanceID)
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		if t.Kind == tasks.BundleInstance && !t.State.Ended() {
			if t.Account != c.account.id {
				return nil, refuse(codeBundling, "Instance '%s' is already being bundled", in.InstanceID)
			}
			return nil, refuse(codeBundling, "Instance '%s' is already being bundled: %s", in.InstanceID, t.ID)
		}
	}
	location := bucket + "/" + prefix + manifestSuffix
	if in.DryRun {
		return nil, catalog.DryRun(s.o.Catalog.Read(ctx, func(v *catalog.View) error { return v.Unregistered(ctx, location) }))
	}
	// The bundle takes the place of one that is there. While it is asked for nobody
	// registers that; afterwards [Server.unbundled] sees the task.
	release, err := s.o.Catalog.Claim(ctx, "BundleInstance", location)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()
	t, err := s.o.Tasks.Submit(ctx, tasks.Request{Kind: tasks.BundleInstance, Instance: in.InstanceID, Account: c.account.id, Bucket: bucket, Prefix: prefix, Expires: end.UTC()})
	if errors.Is(err, tasks.ErrRequest) {
		return nil, refuse(catalog.CodeParameterValue, "%v", err)
	} else if err != nil {
		return nil, err
	}
	return &bundleTaskReply{BundleInstanceTask: newBundleTask(&t)}, nil
}

// checkPolicy looks at the upload policy that clients make for the service that
// bundles. The agent here stores with credentials of its own, so the policy
// gives it nothing; what it forbids is held to, so that nothing is stored that
// its maker did not mean. Its signature is made with SHA-1 and is not checked:
// the request's own signature says who asks. bucket and prefix are as they are
// used and as the request has them, with a folder behind the bucket. end is when
// the policy expires; zero if there is none.
func (s *Server) checkPolicy(c *call, key string, policy []byte, signature string, bucket, prefix [2]string) (end time.Time, err error) {
	if owner, ok := c.accounts.keys[key]; key != "" && (!ok || owner.account != c.account) {
		return end, refuse(catalog.CodeAuthFailure, "The upload policy's access key is none of the account's")
	}
	if len(policy) == 0 {
		if signature != "" {
			return end, refuse(catalog.CodeCombination, "UploadPolicySignature is for an UploadPolicy")
		}
		return end, nil
	}
	var p struct {
		Expiration time.Time         `json:"expiration"`
		Conditions []json.RawMessage `json:"conditions"`
	}
	if err := json.Unmarshal(policy, &p); err != nil {
		return end, refuse(catalog.CodeParameterValue, "The upload policy is no JSON of a policy: %v", err)
	}
	if !s.o.Now().Before(p.Expiration) {
		return end, refuse(catalog.CodeParameterValue, "The upload policy expired at %s", timestamp(p.Expiration))
	}
	for _, raw := range p.Conditions {
		if err := holdPolicy(raw, bucket, prefix); err != nil {
			return end, err
		}
	}
	return p.Expiration, nil
}

// holdPolicy holds one condition of a policy against what is asked for. One that
// the agent's objects might not meet is refused: nobody would check it later.
func holdPolicy(raw json.RawMessage, bucket, prefix [2]string) error {
	var equal map[string]string
	var words []string
	unknown := refuse(catalog.CodeParameterValue, "The upload policy has a condition that cannot be held to: %.200s", raw)
	hold := func(match, name, value string) error {
		switch name = strings.ToLower(strings.TrimPrefix(name, "$")); {
		case match != "eq" && match != "starts-with":
			return unknown
		case name == "bucket" && match == "eq":
			if !slices.Contains(bucket[:], value) {
				return refuse(catalog.CodeAuthFailure, "The upload policy is for the bucket %.100q", value)
			}
		case name == "bucket":
			if !strings.HasPrefix(bucket[0], value) {
				return refuse(catalog.CodeAuthFailure, "The upload policy is for buckets that begin with %.100q", value)
			}
		case name == "key" && match == "starts-with":
			if !strings.HasPrefix(prefix[0], value) && !strings.HasPrefix(prefix[1], value) {
				return refuse(catalog.CodeAuthFailure, "The upload policy is for keys that begin with %.100q", value)
			}
		case name == "key": // a bundle has several
			return refuse(catalog.CodeAuthFailure, "The upload policy is for the key %.100q alone", value)
		case name == "acl" && (match == "eq" || value == ""): // the bucket's policy decides here
		case match == "starts-with" && value == "":
		default:
			return unknown
		}
		return nil
	}
	switch {
	case json.Unmarshal(raw, &equal) == nil && len(equal) > 0:
		for name, is := range equal {
			if err := hold("eq", name, is); err != nil {
				return err
			}
		}
		return nil
	case json.Unmarshal(raw, &words) == nil && len(words) == 3 && strings.HasPrefix(words[1], "$"):
		return hold(strings.ToLower(words[0]), words[1], words[2])
	}
	return unknown
}

type describeBundleTasks struct {
	dry
	BundleID []string `q:"BundleId"`
	Filter   []filter
}

type describeBundleTasksReply struct {
	head
	BundleInstanceTasksSet items[bundleTaskItem] `xml:"bundleInstanceTasksSet"`
}

// tasksOf are the tasks of an instance, of all if it is "", as they stand: those
// that nobody will bring to their end have ended.
func (s *Server) tasksOf(ctx context.Context, instance string) ([]tasks.Task, error) {
	all, err := s.o.Tasks.List(ctx, instance)
	if err != nil {
		return nil, err
	}
	for i, t := range all {
		// That what is known cannot be written down is no reason to withhold it.
		if all[i], err = s.o.Tasks.Lapse(ctx, t); err != nil && ctx.Err() != nil {
			return nil, err
		}
	}
	return all, nil
}

// asked are the tasks of an instance, if the caller may ask for one more: instances can be made up without end.
func (s *Server) asked(ctx context.Context, c *call, instance string) ([]tasks.Task, error) {
	all, err := s.tasksOf(ctx, "")
	if err != nil {
		return nil, err
	}
	unfinished := 0
	for _, t := range all {
		if t.Account == c.account.id && !t.State.Ended() {
			unfinished++
		}
	}
	if unfinished >= s.o.MaxTasks {
		return nil, refuse(codeLimit, "%d tasks of the account are not finished: wait for some of them, or cancel them", unfinished)
	}
	return slices.DeleteFunc(all, func(t tasks.Task) bool { return t.Instance != instance }), nil
}

// bundleTasks are the bundle tasks of an account.
func (s *Server) bundleTasks(ctx context.Context, account string) ([]tasks.Task, error) {
	if s.o.Tasks == nil {
		return nil, nil
	}
	all, err := s.tasksOf(ctx, "")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(t tasks.Task) bool { return t.Kind != tasks.BundleInstance || t.Account != account }), nil
}

func (s *Server) describeBundleTasks(ctx context.Context, c *call, in *describeBundleTasks) (reply, error) {
	match, err := newMatcher(in.Filter, "bundle-id", "instance-id", "state", "start-time", "update-time", "s3-bucket", "s3-prefix", "progress", "error-code", "error-message")
	if err != nil {
		return nil, err
	}
	all, err := s.bundleTasks(ctx, c.account.id)
	if err != nil {
		return nil, err
	}
	for _, id := range in.BundleID {
		if !slices.ContainsFunc(all, func(t tasks.Task) bool { return t.ID == id }) {
			return nil, refuse(codeBundleNotFound, "The bundle ID '%.100s' does not exist", id)
		}
	}
	out := &describeBundleTasksReply{}
	for _, t := range all {
		i := newBundleTask(&t)
		if len(in.BundleID) > 0 && !slices.Contains(in.BundleID, t.ID) || !match.all(func(name string) []string { return i.field(name) }) {
			continue
		}
		out.BundleInstanceTasksSet.Item = append(out.BundleInstanceTasksSet.Item, i)
	}
	return out, nil
}

func (i *bundleTaskItem) field(name string) []string {
	if i.Error != nil {
		switch name {
		case "error-code":
			return []string{i.Error.Code}
		case "error-message":
			return []string{i.Error.Message}
		}
	}
	if v, ok := map[string]string{
		"bundle-id": i.BundleID, "instance-id": i.InstanceID, "state": i.State, "start-time": i.StartTime, "update-time": i.UpdateTime,
		"s3-bucket": i.Storage.S3.Bucket, "s3-prefix": i.Storage.S3.Prefix, "progress": i.Progress,
	}[name]; ok && v != "" {
		return []string{v}
	}
	return nil
}

type cancelBundleTask struct {
	dry
	BundleID string `q:"BundleId!"`
}

func (s *Server) cancelBundleTask(ctx context.Context, c *call, in *cancelBundleTask) (reply, error) {
	all, err := s.bundleTasks(ctx, c.account.id)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(t tasks.Task) bool { return t.ID == in.BundleID })
	if i < 0 {
		return nil, refuse(codeBundleNotFound, "The bundle ID '%.100s' does not exist", in.BundleID)
	}
	if all[i].State.Ended() {
		return nil, refuse(catalog.CodeState, "The bundle task %s is %s", in.BundleID, all[i].State)
	}
	if in.DryRun {
		return nil, catalog.DryRun(nil)
	}
	t, err := s.o.Tasks.Cancel(ctx, all[i])
	if errors.Is(err, tasks.ErrEnded) {
		return nil, refuse(catalog.CodeState, "The bundle task %s has just ended", in.BundleID)
	} else if err != nil {
		return nil, err
	}
	return &bundleTaskReply{BundleInstanceTask: newBundleTask(&t)}, nil
}
