// Museum proves that known mistakes are noticed: it plants each one of its
// catalogue, runs the tests that are to catch it, and demands that they fail.
//
//	go run ./museum [-v] [-run REGEXP] [-j N]
//
// The working tree is not touched: mistakes are laid over the sources with the
// overlay of the go command. The exit status is 1 if one survives that is not
// explained as equivalent. See README.md for the format of the catalogue.
package main

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

//go:embed *.txt
var catalogue embed.FS

func main() {
	verbose := flag.Bool("v", false, "print what the tests said")
	match := flag.String("run", "", "only exhibits whose name matches")
	jobs := flag.Int("j", 2, "exhibits tested at a time")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "museum: unexpected argument %q; -run REGEXP selects exhibits\n", flag.Arg(0))
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *match, *jobs, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "museum:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, match string, jobs int, verbose bool) error {
	re, err := regexp.Compile(match)
	if err != nil {
		return err
	}
	all, err := load(catalogue)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "museum")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var exhibits []*exhibit
	for _, x := range all {
		if re.MatchString(x.name) {
			exhibits = append(exhibits, x)
		}
	}
	work := make(chan *exhibit)
	var wg sync.WaitGroup
	for range max(1, jobs) {
		wg.Go(func() {
			for x := range work {
				x.test(ctx, dir)
				x.print(verbose)
			}
		})
	}
	for _, x := range exhibits {
		work <- x
	}
	close(work)
	wg.Wait()

	killed, equivalent, bad := 0, 0, 0
	for _, x := range exhibits {
		switch {
		case x.verdict == dead:
			killed++
		case x.verdict == survived && x.equivalent != "":
			equivalent++
		default:
			bad++
		}
	}
	fmt.Printf("%d of %d killed, %d equivalent\n", killed, len(exhibits), equivalent)
	if bad > 0 {
		return fmt.Errorf("%d not killed", bad)
	}
	return ctx.Err()
}

// exhibit is one mistake.
type exhibit struct {
	name, story, source string
	pkg, tests          string // what must fail
	equivalent          string // why it may survive
	changes             []change

	verdict string
	by      string // the first test that failed
	output  string
	took    time.Duration
}

// change replaces the only occurrence of old in file by new.
type change struct{ file, old, new string }

const (
	dead     = "killed"
	survived = "SURVIVED"
	broken   = "BROKEN" // does not apply or compile
)

// load reads all exhibits of the catalogue.
func load(files fs.FS) ([]*exhibit, error) {
	names, err := fs.Glob(files, "*.txt")
	if err != nil {
		return nil, err
	}
	var all []*exhibit
	seen := map[string]bool{}
	for _, name := range names {
		b, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		xs, err := parse(string(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for _, x := range xs {
			if seen[x.name] {
				return nil, fmt.Errorf("%s: two exhibits %q", name, x.name)
			}
			seen[x.name] = true
		}
		all = append(all, xs...)
	}
	return all, nil
}

// parse reads the exhibits of one file.
func parse(text string) ([]*exhibit, error) {
	var all []*exhibit
	var x *exhibit
	var into *string // where lines go
	for i, line := range strings.Split(text, "\n") {
		key, value, _ := strings.Cut(line, ": ")
		switch {
		case strings.HasPrefix(line, "== "):
			x = &exhibit{name: line[3:]}
			all = append(all, x)
			into = nil
		case x == nil:
			if line != "" && !strings.HasPrefix(line, "#") {
				return nil, fmt.Errorf("line %d: before the first exhibit", i+1)
			}
		case strings.HasPrefix(line, "--- "):
			x.changes = append(x.changes, change{file: line[4:]})
			into = &x.changes[len(x.changes)-1].old
		case line == "+++" && len(x.changes) > 0:
			into = &x.changes[len(x.changes)-1].new
		case into != nil:
			*into += line + "\n"
		case key == "story":
			x.story = value
		case key == "source":
			x.source = value
		case key == "equivalent":
			x.equivalent = value
		case key == "tests":
			x.pkg, x.tests, _ = strings.Cut(value, " ")
		case line != "":
			return nil, fmt.Errorf("line %d: %q", i+1, line)
		}
	}
	for _, x := range all {
		if x.story == "" || x.source == "" || x.pkg == "" || x.tests == "" || len(x.changes) == 0 {
			return nil, fmt.Errorf("exhibit %q is incomplete", x.name)
		}
		for i := range x.changes {
			c := &x.changes[i]
			c.old, c.new = strings.Trim(c.old, "\n"), strings.Trim(c.new, "\n")
		}
	}
	return all, nil
}

// test plants the mistake and runs the tests.
func (x *exhibit) test(ctx context.Context, dir string) {
	start := time.Now()
	defer func() { x.took = time.Since(start) }()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	fail := func(err error) { x.verdict, x.output = broken, err.Error() }
	for i, c := range x.changes {
		path, err := filepath.Abs(c.file)
		if err != nil {
			fail(err)
			return
		}
		if overlay.Replace[path] != "" {
			path = overlay.Replace[path]
		}
		b, err := os.ReadFile(path)
		if err != nil {
			fail(err)
			return
		}
		if n := strings.Count(string(b), c.old); n != 1 {
			fail(fmt.Errorf("%s: the text to replace occurs %d times", c.file, n))
			return
		}
		mutant := filepath.Join(dir, fmt.Sprintf("%s-%d.go", x.name, i))
		if err := os.WriteFile(mutant, []byte(strings.Replace(string(b), c.old, c.new, 1)), 0o600); err != nil {
			fail(err)
			return
		}
		abs, _ := filepath.Abs(c.file)
		overlay.Replace[abs] = mutant
	}
	b, err := json.Marshal(overlay)
	if err != nil {
		fail(err)
		return
	}
	file := filepath.Join(dir, x.name+".json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		fail(err)
		return
	}
	args := []string{"test", "-overlay", file, "-short", "-vet=off", "-failfast", "-timeout", "120s", "-run", x.tests, x.pkg}
	if x.pkg == "./interop/statemachine" {
		args = append(args, "-rapid.nofailfile") // the mistake is none of the project's
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	x.output = out.String()
	var exit *exec.ExitError
	switch {
	case err == nil && strings.Contains(x.output, "no tests to run"):
		x.verdict = broken
	case err == nil:
		x.verdict = survived
	case errors.As(err, &exit) && !strings.Contains(x.output, "[build failed]") && !strings.Contains(x.output, "[setup failed]"):
		x.verdict = dead
		if m := failed.FindStringSubmatch(x.output); m != nil {
			x.by = " (" + m[1] + ")"
		}
	default:
		x.verdict = broken
		x.output += err.Error()
	}
}

var failed = regexp.MustCompile(`(?m)^--- FAIL: (\w+)`)

// print reports the verdict in one line, and what the tests said if it is bad.
func (x *exhibit) print(verbose bool) {
	var b strings.Builder
	verdict := x.verdict
	if verdict == survived && x.equivalent != "" {
		verdict = "equivalent"
	}
	fmt.Fprintf(&b, "%-10s %-34s %4.1fs  %s%s\n", verdict, x.name, x.took.Seconds(), x.story, x.by)
	if verbose || verdict == survived || verdict == broken {
		out := x.output
		if len(out) > 3000 {
			out = out[:3000] + "…\n"
		}
		b.WriteString(out)
	}
	os.Stdout.WriteString(b.String())
}
