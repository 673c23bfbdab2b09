package main

import (
	"context"
	"flag"

	"github.com/slotota/ota/boot/detect"
)

func detectLoader(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	root := fs.String("root", "/", "`directory` that is looked at, with proc and sys in it")
	asJSON := fs.Bool("json", false, "print JSON")
	return func(_ context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		r := detect.Run(*root)
		if *asJSON {
			if err := e.printJSON(r); err != nil {
				return err
			}
		} else {
			e.printReport(r)
		}
		if len(r.Loaders) == 0 {
			return fail(exitNothing, "ota detect -root looks at another directory", "no boot loader was recognized")
		}
		return nil
	}
}

func (e *env) printReport(r detect.Report) {
	for _, l := range r.Loaders {
		e.printf("%s: %v", e.paint(32, plain(l.Name)), l.Confidence)
		if l.Scheme != "" {
			e.printf(", boot scripts of %s", plain(l.Scheme))
		}
		if l.Package != "" {
			e.printf(", driven by %s", l.Package)
		}
		e.printf("\n")
		for _, s := range l.Evidence {
			e.printf("  %s\n", plain(s))
		}
	}
	for _, s := range []string{r.Slot, r.Root} {
		if s != "" {
			e.printf("kernel    %s\n", plain(s))
		}
	}
	for _, s := range r.Notes {
		e.printf("note: %s\n", plain(s))
	}
}
