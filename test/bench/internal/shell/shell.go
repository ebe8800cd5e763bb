// Package shell runs the scripts that prepare what a bench measures.
//
// What goes in: a script and its arguments. What comes out: what it prints; what
// it says goes to standard error. It touches what the script does.
package shell

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// Run has bash run a script until it ends or anything in it fails; arguments are
// $1 and on.
func Run(ctx context.Context, script string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "bash", append([]string{"-euo", "pipefail", "-c", script, "bash"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%.200s: %w", script, err)
	}
	return strings.TrimSpace(string(out)), nil
}
