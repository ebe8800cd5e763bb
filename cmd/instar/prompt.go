package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"time"
)

// answerTime is how long a question waits for its answer.
const answerTime = 30 * time.Second

// undoTime bounds the removal of what a failed command has stored.
const undoTime = 60 * time.Second

// confirm asks a question to be answered with y or n. --batch answers yes.
// Silence for 30 seconds, or an end of input, is exit status 5.
func (a *app) confirm(ctx context.Context, question string) (bool, error) {
	if a.batch {
		return true, nil
	}
	return ask(ctx, a.stdin, a.stderr, a.tool, question, answerTime)
}

func ask(ctx context.Context, in io.Reader, out io.Writer, tool, question string, wait time.Duration) (bool, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, errSilence)
	defer cancel()
	// The reader cannot be interrupted: it is left behind on silence, and the
	// program ends soon after.
	answers := make(chan string)
	go func() {
		defer close(answers)
		for s := bufio.NewScanner(in); s.Scan(); {
			select {
			case answers <- strings.ToLower(strings.TrimSpace(s.Text())):
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		fmt.Fprintf(out, "%s [y/n] ", question)
		select {
		case <-ctx.Done():
			fmt.Fprintln(out)
			return false, context.Cause(ctx)
		case answer, open := <-answers:
			switch {
			case !open:
				fmt.Fprintln(out)
				return false, withHint(failf(exitPrompt, "nobody answers: %s", question), "With --batch %s asks nothing.", tool)
			case answer == "y" || answer == "yes":
				return true, nil
			case answer == "n" || answer == "no":
				return false, nil
			}
		}
	}
}

var errSilence = &exitError{
	code: exitPrompt, err: fmt.Errorf("no answer within %d seconds", int(answerTime.Seconds())), hint: "With --batch nothing is asked.",
}
