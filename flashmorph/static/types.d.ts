// Names that the scripts of the widgets share, for a type checker; nothing of this is shipped to a page.

/** Constants that show/widget.py puts in front of the scripts. */
declare const OKABE_ITO: string[];
declare const UNITS: Record<string, string[]>;

type Attributes = Record<string, any>;

/** What anywidget gives a script; `alone` where there is no kernel. */
interface Model {
  alone?: boolean;
  get(key: string): any;
  set(key: string, value: any): void;
  save_changes(): void;
  send(content: Record<string, any>): void;
  on(event: string, f: () => void): void;
  off(event: string, f: () => void): void;
}

/** A budget with pins: flashmorph.show.explorer.Choice. */
interface Choice {
  budget: number;
  pinned_full: number[];
  pinned_linear: number[];
}

/** The sets of one method: `sets[budget]` is a mask, or empty. */
interface Method {
  name: string;
  sets: string[];
}

/** A map of recall: flashmorph.results.RecallGrid with a name. */
interface Grid {
  name: string;
  lengths: number[];
  recall: (number | null)[][];
  counts: number[][];
}
