package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/userdata"
)

// RunUserData runs the user data that the initrd laid down in /run/instar: it
// is what instar-user-data.service starts in the image's system. Progress and
// the scripts' output go to out.
func RunUserData(ctx context.Context, out io.Writer) error {
	const dir = "/run/instar"
	data, err := os.ReadFile(dir + "/user-data")
	if err != nil {
		return err
	}
	var facts map[string]string
	text, err := os.ReadFile(dir + "/instance.json")
	if err == nil {
		err = json.Unmarshal(text, &facts)
	}
	if err != nil {
		return fmt.Errorf("reading the instance's facts: %w", err)
	}
	id := facts["instance-id"]
	if id == "" {
		return fmt.Errorf("%s/instance.json names no instance", dir)
	}
	j, err := inject.OpenJournal("/")
	if err != nil {
		return err
	}
	defer j.Close()
	err = userdata.Run(ctx, userdata.Options{
		Root: "/", Dir: dir, Instance: id, User: facts["user"], Journal: j, Client: userdata.NewClient(), Output: out,
		Report: func(line string) { fmt.Fprintf(out, "instar: %s\n", line) },
	}, data)
	if err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}
