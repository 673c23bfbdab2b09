package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/slotota/ota"
)

// command is an entry of the table that usage, manual page and completion are
// made from.
type command struct {
	name     string // one word, or that of a group and another one
	args     string // synopsis of what follows the flags
	short    string // one line
	long     string // paragraphs, one line each
	examples []string
	// setup defines the flags, and returns what runs once they are parsed.
	setup func(fs *flag.FlagSet) func(ctx context.Context, e *env, args []string) error
}

func commands() []command {
	return []command{
		{"keygen", "", "make a key pair to sign with",
			"Writes a P-256 private key (PKCS #8, readable by you only) and beside it the public key for devices and for ota verify. Nothing is overwritten.\n" +
				"With -type note it is an Ed25519 key for signed notes and trust records, which devices with this library accept and which can be rotated; -public makes one of a key that a hardware module keeps.",
			[]string{"ota keygen -o release.pem", "ota keygen -type note -name release-2026 -o release.key",
				"ota keygen -type note -name hsm -public hsm.pem -o hsm.pub"}, keygen},
		{"create", "", "make a bundle from files, a directory or another bundle",
			"The same input gives the same bytes. With SOURCE_DATE_EPOCH set, that is the build's time stamp, and its default build id.\n" +
				"A part is NAME=FILE, then properties of the manifest (type=fs, ptn=fs_0, update=false, ...), and compress=none, deflate or zstd for how it is stored. NAME=,size=N,fill=B is a part without a file. NAME,PROPERTY=VALUE changes a part of the bundle or directory that the new one is made from.\n" +
				"Parts of a bundle (-from) that get no other content and no other packing are taken over byte for byte, with all that is said about them.\n" +
				"A directory holds manifest.json and the files it names, as ota extract writes them; or only files, each of which becomes a part with its name up to the first dot.\n" +
				"Of bundles with zstd (-compress zstd) a device decodes several frames at a time, and downloads only the chunks that it has not got. Devices with Mongoose OS refuse bundles that are compressed, with zstd or with deflate.",
			[]string{
				"ota create -o fw.zip -name gateway -platform acme-gw2 -version 1.2 -part rootfs=rootfs.img -sign release.pem",
				"ota create -o fw.zip -platform acme-gw2 -version 1.2 -compress zstd -profile dense -part rootfs=rootfs.img -part logo=logo.jpg,compress=none",
				"ota create -o fw.zip -from old.zip -version 1.3 -part rootfs=new.img -remove docs",
				"ota create -o fw.zip -dir build/ -platform esp32 -part nvs=,size=16384,fill=255",
			}, create},
		{"sign", "FILE", "add or replace signatures",
			"All else in the bundle keeps its bytes, so that signatures of other keys stay valid. A P-256 key goes into the first place that is free, or that -remove makes free, or into the one named; the signatures of Ed25519 keys (-note) go into one signed note.\n" +
				"To sign with a key that is elsewhere, print the text (-text), sign its bytes with Ed25519 there, and attach the signature (-attach, -by).",
			[]string{"ota sign -note release.key fw.zip", "ota sign -text fw.zip >text", "ota sign -attach text.sig -by hsm.pub fw.zip",
				"ota sign -key release.pem fw.zip", "ota sign -key 2=second.pem -o both.zip fw.zip"}, sign},
		{"inspect", "FILE", "show what is in a bundle",
			"Checks the whole file, but no signatures, except to tell which of the given keys they are by. It also tells what devices with Mongoose OS would say: those of 2016-17 (G1), 2018-19 (G2), and since 2020 (G3).",
			[]string{"ota inspect fw.zip", "ota inspect -key release.pub.pem -json fw.zip"}, inspect},
		{"verify", "FILE...", "check bundles as a device would",
			"Prints one line per file: ok, damaged, unsigned, wrong-key, wrong-platform, wrong-product, too-old or expired, and the particulars. The exit code is that of the first file that fails. - is the standard input.",
			[]string{"ota verify -key release.pub.pem -platform acme-gw2 fw.zip", "ota verify -allow-unsigned -json fw.zip"}, verify},
		{"extract", "FILE [PART...]", "take the manifest and the files out of a bundle",
			"The bundle is verified first. Nothing is overwritten without -f.",
			[]string{"ota extract -C build/ fw.zip", "ota extract -stdout fw.zip rootfs >rootfs.img"}, extract},
		{"push", "FILE|URL", "send a bundle to a device",
			"The bundle is checked, then sent in pieces; broken connections are mended. With -wait it follows the device through its reboot, and reports whether the firmware was committed or rolled back, and why. With -commit-after it commits the firmware itself, once the device has run it and answered for that long.",
			[]string{
				"ota push -device http://192.168.1.5 fw.zip",
				"ota push -device 'serial:///dev/ttyUSB0?baud=115200' fw.zip",
				"OTA_DEVICE=unix:///run/ota.sock ota push -commit-timeout 5m -commit-after 30s fw.zip",
			}, push},
		{"update", "[URL]", "tell a device to download a bundle",
			"Without URL the device chooses itself. -wait and -commit-after are those of ota push.",
			[]string{"ota update -device http://192.168.1.5 -wait https://updates.example.com/fw.zip"}, update},
		{"commit", "", "declare the firmware on trial good",
			"Exit code 3 if there is nothing to commit.",
			[]string{"ota commit -device http://192.168.1.5"}, commit},
		{"revert", "", "go back from the firmware on trial",
			"The device reboots into the firmware before. Exit code 3 if there is nothing to revert.",
			[]string{"ota revert -device http://192.168.1.5"}, revert},
		{"snapshot", "", "copy the running firmware into the free slot",
			"", []string{"ota snapshot -set-as-revert -commit-timeout 10m"}, snapshot},
		{"state", "", "show the boot state, or change it",
			"With any of the flags active, revert, committed and commit-timeout it is changed first (OTA.SetBootState). It takes effect with the next reboot.",
			[]string{"ota state", "ota state -active 1 -commit-timeout 5m && ota call Sys.Reboot"}, state},
		{"status", "", "show what a device runs and does",
			"", []string{"ota status -device http://192.168.1.5", "ota status -follow"}, status},
		{"call", "METHOD [JSON]", "call any method of a device",
			"Prints the result.",
			[]string{`ota call RPC.List`, `ota call Sys.Reboot '{"delay_ms":500}'`}, call},
		{"detect", "", "tell which boot loader this machine runs",
			"Looks at the kernel's command line, the device tree, EFI variables, and the files in which boot loaders keep their state; changes nothing. Exit code 3 if none is recognized.",
			[]string{"ota detect", "ota detect -root /mnt/image -json"}, detectLoader},
		{"selftest", "", "check storage and boot record of this machine",
			"Runs the conformance suites of the library (packages flashtest and boottest) on spare storage of the device. With -health it reports what would stop a rollback on this machine: no panic= on the command line, no watchdog that runs, and so on; it changes nothing then, and fails if anything critical is found.",
			[]string{"ota selftest -health", "ota selftest -overwrite -flash /dev/mmcblk0p9", "ota selftest -record /data/ota/test0 -record /data/ota/test1 -record /data/ota/test2"}, selftest},
		{"simulate", "", "run a device whose flash is files",
			"It boots, serves RPC, installs, reboots, commits and rolls back like a real one. Its life goes on where it ended when it is started again with the same directory; killing it is a power cut.",
			[]string{
				"ota simulate -dir dev -listen 127.0.0.1:8080 -key release.pub.pem",
				"ota simulate -dir dev -listen unix://$PWD/dev.sock -allow-unsigned -part rootfs=64M -unhealthy 1.3",
			}, simulate},
		{"serve", "DIR", "serve bundles over HTTP",
			"A static server with ranges and ETags. Devices that tell their firmware (X-MGOS-FW-Version) are answered 304 if the bundle has the same platform, version and build id.",
			[]string{"ota serve -listen :8080 releases/"}, serve},
		{"trust init", "", "make the first record of the keys that devices trust",
			"Root keys sign such records, release keys sign bundles. No key may be both. The record counts once enough root keys have signed it (-note, or ota trust sign). docs/SIGNING.md tells how to keep the keys.",
			[]string{"ota trust init -o trust -root alice.pub -root bob.pub -root carol.pub -root-threshold 2 -release release.pub"}, trustInit},
		{"trust rotate", "", "make the next record",
			"What is not given stays as it was; a list of keys replaces the one before. Enough root keys of both the old and the new record must sign it.",
			[]string{"ota trust rotate -trust trust -o next -release new-release.pub -note alice.key -note bob.key"}, trustRotate},
		{"trust sign", "FILE", "add or remove signatures of a record",
			"It works like ota sign. What is signed elsewhere is what -text prints.",
			[]string{"ota trust sign -note bob.key next", "ota trust sign -attach text.sig -by hsm.pub next"}, trustSign},
		{"trust verify", "FILE", "check a record, or a chain of them",
			"With -trust it must continue the chain that devices have. Exit code 3 if it is not newer, 4 if it is wrong.",
			[]string{"ota trust verify trust", "ota trust verify -trust trust -o chain next"}, trustVerify},
		{"trust show", "FILE", "show a record, and who must still sign it", "",
			[]string{"ota trust show trust", "ota trust show -trust trust -json next"}, trustShow},
		{"completion", "bash|zsh|fish", "print completion for a shell",
			"", []string{"source <(ota completion bash)", "ota completion fish >~/.config/fish/completions/ota.fish"}, completion},
		{"man", "", "print the manual page", "", []string{"ota man >ota.1"}, man},
		{"version", "", "print the version", "", []string{"ota version"},
			func(*flag.FlagSet) func(context.Context, *env, []string) error {
				return func(_ context.Context, e *env, args []string) error {
					if err := want(args, 0, 0); err != nil {
						return err
					}
					e.printf("ota %s\n", version())
					return nil
				}
			}},
		{"help", "[COMMAND...]", "tell how to use a command", "", []string{"ota help create"}, help},
	}
}

// want reports a wrong number of arguments.
func want(args []string, lo, hi int) error {
	switch {
	case len(args) < lo:
		return usagef("too few arguments")
	case len(args) > hi:
		return usagef("argument %s is too many", ota.Quote(args[hi]))
	}
	return nil
}

// flags returns the flags of c, sorted.
func (c *command) flags() (flags []*flag.Flag) {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	c.setup(fs)
	fs.VisitAll(func(f *flag.Flag) { flags = append(flags, f) })
	return flags
}

func (c *command) synopsis() string {
	s := "ota " + c.name
	if len(c.flags()) > 0 {
		s += " [FLAG...]"
	}
	return strings.TrimSpace(s + " " + c.args)
}

func (e *env) usage(w io.Writer) {
	fmt.Fprint(w, "Usage: ota COMMAND [FLAG...] [ARGUMENT...]\n\nUpdates of devices with two or more firmware slots.\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-12s %s\n", c.name, c.short)
	}
	fmt.Fprint(w, "\nota COMMAND -h tells about a command. Devices are named by -device or OTA_DEVICE:\n"+
		wrap(deviceURLs+".", "", 80)+"\n")
}

func (c *command) help(w io.Writer) {
	fmt.Fprintf(w, "Usage: %s\n\n%s.\n", c.synopsis(), strings.ToUpper(c.short[:1])+c.short[1:])
	for p := range strings.Lines(c.long) {
		fmt.Fprintf(w, "\n%s\n", wrap(strings.TrimSpace(p), "", 80))
	}
	fmt.Fprint(w, "\nExamples:\n")
	for _, x := range c.examples {
		fmt.Fprintf(w, "  %s\n", x)
	}
	if flags := c.flags(); len(flags) > 0 {
		fmt.Fprint(w, "\nFlags:\n")
		for _, f := range flags {
			arg, text := describe(f)
			fmt.Fprintf(w, "  -%s\n%s\n", strings.TrimSpace(f.Name+" "+arg), wrap(text, "        ", 80))
		}
	}
	fmt.Fprint(w, "\nExit codes:\n")
	for _, x := range exitCodes {
		if x.code < 10 || c.name == "verify" {
			fmt.Fprintf(w, "  %2d  %s\n", x.code, strings.TrimPrefix(x.text, "verify: "))
		}
	}
}

// describe returns the argument of f and what f is for.
func describe(f *flag.Flag) (arg, text string) {
	arg, text = flag.UnquoteUsage(f)
	text = strings.TrimSuffix(text, ": "+arg) // which only names it
	if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "0s" {
		text += " (default " + f.DefValue + ")"
	}
	return arg, text
}

func wrap(text, indent string, width int) string {
	var b strings.Builder
	n := 0
	for _, w := range strings.Fields(text) {
		if n > 0 && n+1+len(w) > width {
			b.WriteByte('\n')
			n = 0
		}
		if n == 0 {
			b.WriteString(indent)
			n = len(indent)
		} else {
			b.WriteByte(' ')
			n++
		}
		b.WriteString(w)
		n += len(w)
	}
	return b.String()
}

func help(*flag.FlagSet) func(context.Context, *env, []string) error {
	return func(_ context.Context, e *env, args []string) error {
		if len(args) == 0 {
			e.usage(e.stdout)
			return nil
		}
		c, rest := find(args)
		if c == nil {
			return fail(exitUsage, "ota help lists them", "no command %s", ota.Quote(strings.Join(args, " ")))
		}
		if err := want(rest, 0, 0); err != nil {
			return err
		}
		c.help(e.stdout)
		return nil
	}
}

// find returns the command that args begin with, and the rest of them; no command, and
// as many of args as might name one, if there is none.
func find(args []string) (*command, []string) {
	for _, c := range commands() {
		if n := len(strings.Fields(c.name)); len(args) >= n && strings.Join(args[:n], " ") == c.name {
			return &c, args[n:]
		}
	}
	n := 1
	if len(args) > 1 && slices.Contains(groups(), args[0]) {
		n = 2
	}
	return nil, args[:n]
}

// groups returns the first words of commands that have two.
func groups() (names []string) {
	for _, c := range commands() {
		if g, _, ok := strings.Cut(c.name, " "); ok && !slices.Contains(names, g) {
			names = append(names, g)
		}
	}
	return names
}

// members returns the second words of the commands of a group.
func members(group string) (names []string) {
	for _, c := range commands() {
		if m, ok := strings.CutPrefix(c.name, group+" "); ok {
			names = append(names, m)
		}
	}
	return names
}

// man prints a manual page for the macros of man(7).
func man(*flag.FlagSet) func(context.Context, *env, []string) error {
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		esc := func(s string) string {
			s = strings.NewReplacer(`\`, `\e`, `-`, `\-`, "`", `\(ga`, `'`, `\(aq`).Replace(s)
			if strings.HasPrefix(s, ".") {
				s = `\&` + s
			}
			return s
		}
		w := bufio.NewWriter(e.stdout)
		defer w.Flush()
		fmt.Fprintf(w, ".TH OTA 1\n.SH NAME\nota \\- firmware bundles, and the devices that install them\n.SH SYNOPSIS\n")
		for _, c := range commands() {
			fmt.Fprintf(w, ".PP\n%s\n", esc(c.synopsis()))
		}
		fmt.Fprintf(w, ".SH COMMANDS\n")
		for _, c := range commands() {
			fmt.Fprintf(w, ".SS %s\n%s.\n", esc(c.synopsis()), esc(strings.ToUpper(c.short[:1])+c.short[1:]))
			for p := range strings.Lines(c.long) {
				fmt.Fprintf(w, ".PP\n%s\n", esc(strings.TrimSpace(p)))
			}
			for _, f := range c.flags() {
				arg, text := describe(f)
				fmt.Fprintf(w, ".TP\n%s\n%s\n", esc("-"+strings.TrimSpace(f.Name+" "+arg)), esc(text))
			}
			fmt.Fprint(w, ".PP\nExamples:\n.PP\n.nf\n")
			for _, x := range c.examples {
				fmt.Fprintf(w, "%s\n", esc(x))
			}
			fmt.Fprint(w, ".fi\n")
		}
		fmt.Fprint(w, ".SH EXIT STATUS\n")
		for _, x := range exitCodes {
			fmt.Fprintf(w, ".TP\n%d\n%s\n", x.code, esc(x.text))
		}
		fmt.Fprint(w, ".SH ENVIRONMENT\n")
		for _, v := range variables {
			fmt.Fprintf(w, ".TP\n%s\n%s\n", v[0], esc(v[1]))
		}
		return nil
	}
}

var variables = [][2]string{
	{"OTA_DEVICE", "URL of the device, in place of -device."},
	{"OTA_TOKEN", "Bearer token for the device, in place of -token-file; not used with a user."},
	{"OTA_PASSWORD", "Password of -user for the device, in place of -password-file."},
	{"SOURCE_DATE_EPOCH", "Time of the build for ota create, in seconds since 1970."},
	{"NO_COLOR", "If not empty, there are no colours."},
}

func completion(*flag.FlagSet) func(context.Context, *env, []string) error {
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		names := groups()
		for _, c := range commands() {
			if !strings.Contains(c.name, " ") {
				names = append(names, c.name)
			}
		}
		flags := func(c command) (s []string) {
			for _, f := range c.flags() {
				s = append(s, "-"+f.Name)
			}
			return append(s, "-h")
		}
		switch args[0] {
		case "bash":
			e.printf("_ota() {\n\tlocal cur=${COMP_WORDS[COMP_CWORD]} cmd=${COMP_WORDS[1]}\n\tCOMPREPLY=()\n"+
				"\tif [ \"$COMP_CWORD\" -eq 1 ]; then\n\t\tCOMPREPLY=($(compgen -W '%s' -- \"$cur\"))\n\t\treturn\n\tfi\n"+
				"\tcase \"$cmd\" in\n", strings.Join(names, " "))
			for _, g := range groups() {
				e.printf("\t%s)\n\t\tif [ \"$COMP_CWORD\" -eq 2 ]; then\n\t\t\tCOMPREPLY=($(compgen -W '%s' -- \"$cur\"))\n\t\t\treturn\n\t\tfi\n"+
					"\t\tcmd=\"$cmd ${COMP_WORDS[2]}\" ;;\n", g, strings.Join(members(g), " "))
			}
			e.printf("\tesac\n\tcase \"$cur\" in -*) ;; *) return ;; esac\n\tlocal flags=\n\tcase \"$cmd\" in\n")
			for _, c := range commands() {
				e.printf("\t'%s') flags='%s' ;;\n", c.name, strings.Join(flags(c), " "))
			}
			e.printf("\tesac\n\tCOMPREPLY=($(compgen -W \"$flags\" -- \"$cur\"))\n}\ncomplete -o default -F _ota ota\n")
		case "zsh":
			e.printf("#compdef ota\n_ota() {\n\tlocal cmd=$words[2]\n\tif (( CURRENT == 2 )); then\n\t\tlocal -a names=(\n")
			for _, g := range groups() {
				e.printf("\t\t\t%s\n", single(g+":"+strings.Join(members(g), ", ")))
			}
			for _, c := range commands() {
				if !strings.Contains(c.name, " ") {
					e.printf("\t\t\t%s\n", single(c.name+":"+c.short))
				}
			}
			e.printf("\t\t)\n\t\t_describe command names\n\t\treturn\n\tfi\n\tcase $cmd in\n")
			for _, g := range groups() {
				e.printf("\t%s)\n\t\t(( CURRENT == 3 )) && compadd -- %s && return\n\t\tcmd=\"$cmd $words[3]\" ;;\n", g, strings.Join(members(g), " "))
			}
			e.printf("\tesac\n\tcase $cmd in\n")
			for _, c := range commands() {
				e.printf("\t%s) [[ $PREFIX == -* ]] && compadd -- %s && return ;;\n", single(c.name), strings.Join(flags(c), " "))
			}
			e.printf("\tesac\n\t_files\n}\ncompdef _ota ota\n")
		case "fish":
			for _, g := range groups() {
				e.printf("complete -c ota -n __fish_use_subcommand -f -a %s\n", g)
				for _, m := range members(g) {
					e.printf("complete -c ota -n '__fish_seen_subcommand_from %s; and not __fish_seen_subcommand_from %s' -f -a %s\n", g, strings.Join(members(g), " "), m)
				}
			}
			for _, c := range commands() {
				when := "__fish_seen_subcommand_from " + c.name
				if g, m, ok := strings.Cut(c.name, " "); ok {
					when = "__fish_seen_subcommand_from " + g + "; and __fish_seen_subcommand_from " + m
				} else {
					e.printf("complete -c ota -n __fish_use_subcommand -f -a %s -d %s\n", c.name, single(c.short))
					for _, g := range groups() {
						when += "; and not __fish_seen_subcommand_from " + g
					}
				}
				for _, f := range c.flags() {
					_, text := describe(f)
					e.printf("complete -c ota -n '%s' -o %s -d %s\n", when, f.Name, single(text))
				}
			}
		default:
			return usagef("no shell %s: need bash, zsh or fish", ota.Quote(args[0]))
		}
		return nil
	}
}

// single returns s in single quotes, in which only these are special.
func single(s string) string {
	return "'" + strings.NewReplacer(`\`, "/", "'", "").Replace(s) + "'"
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return "" }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }
