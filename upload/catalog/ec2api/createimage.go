package ec2api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

type createImage struct {
	dry
	InstanceID         string `q:"InstanceId!"`
	Name               string `q:"Name!"`
	Description        string
	NoReboot           bool
	BlockDeviceMapping []mappingParam
	TagSpecification   []tagSpecification
}

// createImage registers an image that is pending, and asks the instance's agent
// for it. The agent captures the running system as the store's image named
// after the instance; settle makes the record available when it is there.
func (s *Server) createImage(ctx context.Context, c *call, in *createImage) (reply, error) {
	if err := s.taskable(c, in.InstanceID); err != nil {
		return nil, err
	}
	tags, err := tagsOf(in.TagSpecification, "image", "snapshot")
	if err != nil {
		return nil, err
	}
	devices, err := mappings(in.BlockDeviceMapping)
	if err != nil {
		return nil, err
	}
	all, err := s.asked(ctx, c, in.InstanceID)
	if err != nil {
		return nil, err
	}
	unfinished := 0
	for _, t := range all {
		if !t.State.Ended() {
			unfinished++
		}
	}
	if unfinished >= maxUnfinished {
		return nil, refuse(codeLimit, "Instance '%s' has %d tasks to do already", in.InstanceID, unfinished)
	}
	m, err := s.o.Catalog.CreatePending(ctx, c.as(in.DryRun), "CreateImage", catalog.Image{
		Name: in.Name, Description: in.Description, BlockDevices: devices, Tags: tags, SourceInstance: in.InstanceID,
		Architecture: "x86_64", VirtualizationType: "hvm",
	}, nil)
	if err != nil {
		return nil, err
	}
	_, err = s.o.Tasks.Submit(ctx, tasks.Request{
		Kind: tasks.CreateImage, Instance: in.InstanceID, Account: c.account.id, ImageID: m.ID, Name: in.InstanceID,
		Description: in.Description, NoReboot: in.NoReboot,
	})
	if err != nil {
		// Nobody will make it: say so, and not that it is on its way.
		ferr := s.o.Catalog.Fail(context.WithoutCancel(ctx), c.as(false), m.ID, catalog.Reason{Code: "Server.InternalError", Message: "the instance's agent could not be asked"})
		return nil, errors.Join(err, ferr)
	}
	return &imageIDReply{ImageID: m.ID}, nil
}

// maxUnfinished is how many tasks an instance may have at a time.
const maxUnfinished = 16

// settler is who changes records that agents have made true.
const settler = "instar catalog serve"

// settle finds out what became of pending images that agents make, and says so
// in the catalog: those of one account, or of all if it is "".
func (s *Server) settle(ctx context.Context, account string) error {
	if s.o.Tasks == nil {
		return nil
	}
	var pending []*catalog.Image
	err := s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		pending = nil
		for m, err := range v.Images(ctx) {
			if err != nil {
				return err
			}
			if m.State == catalog.Pending && m.Kind == catalog.KindNone && m.SourceInstance != "" && (account == "" || m.Owner == account) {
				pending = append(pending, m)
			}
		}
		return nil
	})
	if err != nil || len(pending) == 0 {
		return err
	}
	// What is wrong with one image is no reason to leave others.
	var wrong []error
	known := make(map[string][]tasks.Task)
	for _, m := range pending {
		if ctx.Err() != nil {
			return errors.Join(append(wrong, context.Cause(ctx))...)
		}
		all, asked := known[m.SourceInstance]
		if !asked {
			all, err = s.tasksOf(ctx, m.SourceInstance)
			if err != nil {
				wrong = append(wrong, fmt.Errorf("image %s: %w", m.ID, err))
				continue
			}
			known[m.SourceInstance] = all
		}
		if err := s.settleOne(ctx, m, all); err != nil {
			wrong = append(wrong, fmt.Errorf("image %s: %w", m.ID, err))
		}
	}
	return errors.Join(wrong...)
}

// Settle is for whoever calls it now and then, so that images become available
// even if nobody asks for them; it ends tasks that have lapsed, has those cancelled
// whose image is gone, and forgets old ones.
func (s *Server) Settle(ctx context.Context) error {
	if s.o.Tasks == nil || s.o.ReadOnly {
		return nil
	}
	err := s.settle(ctx, "")
	all, lerr := s.tasksOf(ctx, "")
	if lerr == nil {
		lerr = s.withdraw(ctx, all)
	}
	_, ferr := s.o.Tasks.Forget(ctx)
	return errors.Join(err, lerr, ferr)
}

// withdraw has the tasks cancelled whose image was deregistered meanwhile: what
// their agents make would be nobody's.
func (s *Server) withdraw(ctx context.Context, all []tasks.Task) error {
	all = slices.DeleteFunc(all, func(t tasks.Task) bool {
		return t.Kind != tasks.CreateImage || t.State.Ended() || t.State == tasks.Cancelling
	})
	if len(all) == 0 {
		return nil
	}
	var gone []tasks.Task
	err := s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		gone = nil
		for _, t := range all {
			m, err := v.Image(ctx, t.ImageID)
			if err != nil {
				return err
			}
			if m == nil || m.State != catalog.Pending {
				gone = append(gone, t)
			}
		}
		return nil
	})
	for _, t := range gone {
		if _, cerr := s.o.Tasks.Cancel(ctx, t); cerr != nil && !errors.Is(cerr, tasks.ErrEnded) {
			err = errors.Join(err, cerr)
		}
	}
	return err
}

func (s *Server) settleOne(ctx context.Context, m *catalog.Image, all []tasks.Task) error {
	by := catalog.Call{Account: m.Owner, By: settler}
	fail := func(code, format string, a ...any) error {
		return s.o.Catalog.Fail(ctx, by, m.ID, catalog.Reason{Code: code, Message: fmt.Sprintf(format, a...)})
	}
	now := s.o.Now()
	i := slices.IndexFunc(all, func(t tasks.Task) bool { return t.ImageID == m.ID && t.Account == m.Owner })
	if i < 0 {
		if now.Sub(m.Created) < tasks.Lifetime {
			return nil // it is being submitted
		}
		return fail("Server.InternalError", "the task of the instance's agent is gone")
	}
	switch t := &all[i]; {
	case t.State == tasks.Complete:
		// The status is anybody's word who may write the bucket: what it names
		// must be this instance's image, with a good signature, and made since it was
		// asked for. When that was, the catalog itself says.
		name, version, ok := strings.Cut(t.Manifest, "@")
		if name != t.Name || !ok || version == "" {
			return fail("Server.InternalError", "the agent made %q and was asked for %q", t.Manifest, t.Name)
		}
		err := s.o.Catalog.Complete(ctx, by, m.ID, t.Manifest, m.Created)
		// A refusal stays one, however often it is asked for.
		if refused := (*catalog.Error)(nil); errors.As(err, &refused) {
			return fail("Client."+refused.Code, "%v", refused)
		}
		return err
	case t.State == tasks.Failed:
		code := t.Code
		switch {
		case code == "":
			code = "Server.InternalError"
		case !strings.HasPrefix(code, "Server.") && !strings.HasPrefix(code, "Client."):
			code = "Server." + code
		}
		return fail(code, "%s", t.Message)
	case t.State == tasks.Cancelled:
		return fail("Client.Cancelled", "the task was cancelled")
	}
	return nil
}
