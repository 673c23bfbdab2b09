// Ota makes, checks and delivers firmware bundles, and talks to the devices that
// install them: those that are made with the library github.com/slotota/ota, and
// genuine ones with Mongoose OS.
//
//	ota help
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
	"github.com/slotota/ota/rpcjson"
)

// Exit codes. Scripts rely on them; they are explained in exitCodes.
const (
	exitOK            = 0
	exitFailed        = 1
	exitUsage         = 2
	exitNothing       = 3
	exitVerify        = 4
	exitBusy          = 5
	exitUncommitted   = 6
	exitUnreachable   = 7
	exitDamaged       = 10
	exitUnsigned      = 11
	exitWrongKey      = 12
	exitWrongPlatform = 13
	exitTooOld        = 14
	exitExpired       = 15
)

var exitCodes = []struct {
	code int
	text string
}{
	{exitOK, "it worked"},
	{exitFailed, "it failed"},
	{exitUsage, "wrong usage"},
	{exitNothing, "nothing to do: already committed, already installed, no such update"},
	{exitVerify, "the firmware did not pass verification"},
	{exitBusy, "the device is busy with another update, or about to reboot"},
	{exitUncommitted, "the firmware is not committed: still on trial, or rolled back"},
	{exitUnreachable, "the device cannot be reached, or does not answer"},
	{exitDamaged, "verify: damaged, or no bundle at all"},
	{exitUnsigned, "verify: a required signature is missing"},
	{exitWrongKey, "verify: a signature is by another key, or wrong"},
	{exitWrongPlatform, "verify: for another platform or product"},
	{exitTooOld, "verify: the security version is too low"},
	{exitExpired, "verify: the trust record has expired"},
}

// failure is an error with an exit code of its own, and perhaps a hint what to do.
type failure struct {
	code int
	err  error
	hint string
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(code int, hint, format string, args ...any) error {
	return &failure{code, fmt.Errorf(format, args...), hint}
}

func usagef(format string, args ...any) error { return fail(exitUsage, "", format, args...) }

// env is what a command sees of the world.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	terminal       bool // stderr is one
	colour         bool // stdout is a terminal that wants it
}

// printf prints a result.
func (e *env) printf(format string, args ...any) { fmt.Fprintf(e.stdout, format, args...) }

// notef prints a message.
func (e *env) notef(format string, args ...any) {
	fmt.Fprintf(e.stderr, "ota: "+format+"\n", args...)
}

// paint returns s in a colour (31 red, 32 green, 33 yellow), if colours are wanted.
func (e *env) paint(colour int, s string) string {
	if !e.colour {
		return s
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", colour, s)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	e := &env{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv,
		terminal: isTerminal(os.Stderr),
		colour:   isTerminal(os.Stdout) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb",
	}
	code := e.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && f.Name() != os.DevNull
}

// output is the standard output. It remembers the first error, as those who print
// do not look.
type output struct {
	w io.Writer

	mu  sync.Mutex
	err error
}

func (o *output) Write(p []byte) (n int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		n, o.err = o.w.Write(p)
	}
	return n, o.err
}

// run runs a command and returns the exit code.
func (e *env) run(ctx context.Context, args []string) int {
	out := &output{w: e.stdout}
	inner := *e
	inner.stdout = out
	code, err := inner.dispatch(ctx, args)
	if out.err != nil && !errors.Is(err, out.err) {
		e.notef("%v", out.err)
		if code == exitOK {
			code = exitFailed
		}
	}
	return code
}

// dispatch runs a command and returns the exit code, and the error it has told of.
func (e *env) dispatch(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		e.usage(e.stderr)
		return exitUsage, nil
	}
	switch args[0] {
	case "-h", "-help", "--help":
		e.usage(e.stdout)
		return exitOK, nil
	case "-version", "--version":
		args[0] = "version"
	}
	c, args := find(args)
	if c == nil {
		e.notef("no command %s", ota.Quote(strings.Join(args, " ")))
		if m := members(args[0]); len(m) > 0 {
			e.notef("hint: ota %s has %s", args[0], strings.Join(m, ", "))
		} else {
			e.notef("hint: ota help lists them")
		}
		return exitUsage, nil
	}
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	run := c.setup(fs)
	rest, err := parse(fs, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.help(e.stdout)
		return exitOK, nil
	case err != nil:
		err = usagef("%w", err)
	default:
		err = run(ctx, e, rest)
	}
	return e.report(c, err), err
}

// parse parses flags wherever they stand; after -- there are none.
func parse(fs *flag.FlagSet, args []string) (rest []string, err error) {
	var tail []string
	if i := slices.Index(args, "--"); i >= 0 {
		args, tail = args[:i], args[i+1:]
	}
	for len(args) > 0 {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		if args = fs.Args(); len(args) > 0 {
			rest, args = append(rest, args[0]), args[1:]
		}
	}
	return append(rest, tail...), nil
}

// report tells about err and returns the exit code.
func (e *env) report(c *command, err error) int {
	if err == nil {
		return exitOK
	}
	code, hint := classify(err)
	var f *failure
	if errors.As(err, &f) {
		code, hint = f.code, f.hint
	}
	text := err.Error()
	if remote, ok := err.(*rpcjson.Error); ok {
		text = fmt.Sprintf("the device answers error %d", remote.Code)
		if remote.Message != "" {
			text += ": " + plain(remote.Message)
		}
	}
	if text != "" {
		e.notef("%s: %s", c.name, text)
	}
	if code == exitUsage && hint == "" {
		hint = "ota " + c.name + " -h tells how"
	}
	if hint != "" {
		e.notef("hint: %s", hint)
	}
	return code
}

// classify returns the exit code and a hint for an error without its own.
func classify(err error) (code int, hint string) {
	var remote *rpcjson.Error
	var bad *bundle.Error
	var unreadable *fs.PathError
	switch {
	case errors.Is(err, context.Canceled):
		return exitFailed, ""
	case errors.As(err, &remote):
		return classifyRemote(remote)
	case errors.Is(err, rpcjson.ErrNoReply):
		return exitUnreachable, "is the device on, and is this its address?"
	case errors.Is(err, ota.ErrBusy):
		return exitBusy, "wait for it (ota status -follow), continue it (ota push -resume), or end it (ota call OTA.End)"
	case errors.Is(err, ota.ErrRebootPending):
		return exitBusy, "wait until it has rebooted: ota status"
	case errors.Is(err, bundle.ErrPolicy):
		return exitUsage, ""
	case errors.Is(err, trust.ErrOld):
		return exitNothing, ""
	case slices.ContainsFunc(untrusted, func(e error) bool { return errors.Is(err, e) }):
		return exitVerify, ""
	case errors.As(err, &bad) && !errors.As(err, &unreadable):
		return exitVerify, ""
	}
	return exitFailed, ""
}

// untrusted are the reasons to refuse a trust record.
var untrusted = []error{trust.ErrFormat, trust.ErrTooLarge, trust.ErrRecord, trust.ErrSignature, trust.ErrText,
	trust.ErrUnsigned, trust.ErrVersion, trust.ErrFork, trust.ErrExpired}

// classifyRemote knows the errors of devices of all kinds.
func classifyRemote(e *rpcjson.Error) (code int, hint string) {
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(e, t) })
	}
	switch {
	case e.Code == 401:
		return exitFailed, "give a token (-token-file, or OTA_TOKEN), or a user (-user, and OTA_PASSWORD)"
	case e.Code == 403:
		return exitFailed, "the device does not allow this to you, or does not know itself by this host name"
	case e.Code == 404:
		return exitFailed, "ota call RPC.List lists what the device can"
	case is(ota.ErrRebootPending):
		return exitBusy, "wait until it has rebooted: ota status"
	case is(ota.ErrNotCommitted, ota.ErrExpired):
		return exitUncommitted, "decide about the firmware on trial first: ota commit, or ota revert"
	case is(ota.ErrBusy):
		return exitBusy, "wait for it (ota status -follow), or end it (ota call OTA.End)"
	case is(ota.ErrUnverified, ota.ErrDigest, ota.ErrRollback, ota.ErrStep):
		return exitVerify, ""
	}
	return exitFailed, ""
}

func version() string {
	if b, ok := debug.ReadBuildInfo(); ok {
		return b.Main.Version + " " + b.GoVersion
	}
	return "unknown"
}
